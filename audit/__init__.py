"""What an auditor runs: offline verification of everything a study left behind."""
