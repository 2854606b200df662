"""The secure sum and its records: typed messages, sans-IO state machines, agreement, transcript, ledger."""
