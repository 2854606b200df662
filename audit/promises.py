"""The promises of the threat model (docs/threat-model.md), row by row, and who tests what an audit does not play.

A test compares them with the document.
"""

from __future__ import annotations

from typing import NamedTuple


class Promise(NamedTuple):
    """One row of docs/threat-model.md. `elsewhere` says who tests it, where this audit does not."""

    row: str
    adversary: str
    promise: str
    elsewhere: str = ""


PROMISES = (
    Promise("curious-masked", "curious aggregator (masked)", "uploads look uniform; it learns the sum only"),
    Promise(
        "curious-encrypted",
        "curious aggregator (layered, homomorphic)",
        "it holds no key and cannot decrypt uploads or sum",
    ),
    Promise(
        "key-holder",
        "... with a hospital that gives it the study key",
        "layered: what they decrypt of one node is uniform; homomorphic: no promise",
    ),
    Promise(
        "study-keys",
        "... or two study keys, other people's keys, keys at the wrong time",
        "nobody sums with a hospital that was dealt another key; none is changed once a round was opened",
    ),
    Promise(
        "ciphertext-sum", "... one upload, or an old one, in the place of a sum of ciphertexts", "caught by the tags"
    ),
    Promise(
        "keys",
        "malicious aggregator: substituted, replayed or withheld round keys; invented hospitals; a shrunk cohort",
        "every node refuses and leaves, naming the aggregator",
    ),
    Promise(
        "parameters",
        "... another threshold, ring, clip or precision than agreed",
        "refused; all parameters come from the pinned agreement",
    ),
    Promise("both-shares", "... self-seed and pair share of one node", "a node gives one of the two"),
    Promise(
        "survivors",
        "... different survivor sets to different nodes; too few, forged or repeated votes",
        "nothing is revealed",
    ),
    Promise(
        "neighbours",
        '... honest neighbours that "never dealt seeds", or a victim cut off in a sparse graph',
        "refused before the vote",
    ),
    Promise(
        "second-sum",
        "... a second sum of one round, after the first or beside it; an old round or attempt; an upload that comes after its "
        "pair masks were revealed",
        "refused, unless it is of the same nodes with the same updates of all honest ones; the self mask keeps a late upload private",
    ),
    Promise(
        "changed-sum",
        "... a changed, truncated or re-ordered sum, with records signed anew to fit it",
        "caught by the tags at every honest node",
    ),
    Promise(
        "multiple",
        "... a multiple of the sum with the same multiple of its tags; a countersignature for a record that its signer never "
        "checked",
        "caught; not given",
    ),
    Promise(
        "latecomer",
        "... a wrong sum for a node that took no part",
        "wants more countersignatures than may collude",
    ),
    Promise(
        "two-stories", "... two stories to two nodes", "a node that sees both leaves; the auditor sees EQUIVOCATION"
    ),
    Promise(
        "fork",
        "... a round that some nodes take for lost and others have applied",
        "nobody sums with who builds on another sum",
    ),
    Promise(
        "order",
        "... sums out of order, or one that a node is made to miss",
        "applied in the order in which they build on each other",
    ),
    Promise(
        "no-ciphertexts",
        "malicious node: ciphertexts that are none, or that crash the library",
        "that upload alone is lost, its sender is named, the total is as before",
    ),
    Promise(
        "no-study-key",
        "... a study key that it claims and does not deal, or seals badly, or that is none (0, say)",
        "the next one is asked",
    ),
    Promise(
        "messages",
        "malicious node: a second upload with another digest; broken, oversized or random messages",
        "named, put out; the round goes on",
    ),
    Promise(
        "shares",
        "... wrong shares, dealt or revealed",
        "who lied is named by digests that the dealer signed; nobody else is",
    ),
    Promise(
        "contributions",
        "... contributions to pair seeds that its pair master does not give",
        "who sealed them is named; the round is lost",
    ),
    Promise(
        "complaints",
        "... complaints, provoked or false",
        "no secret is disclosed; it can keep one honest node out of an attempt, together with itself, and both are named",
    ),
    Promise(
        "not-finite",
        "... NaN, infinity, out of range",
        "refused by honest nodes before anything is sent; clipped",
    ),
    Promise("tag-seeds", "... two tag seeds from one dealer", "complaint; the tag of the others holds"),
    Promise("silence", "... silence in any phase", "costs one deadline a phase"),
    Promise(
        "losses",
        "a node lost in any phase; connections lost at any message",
        "recovered from while enough remain; below that nothing is opened; nobody honest is blamed",
    ),
    Promise(
        "cut-lines",
        "whoever cuts lines again and again, or withholds its receipt",
        "nobody honest is blamed or expelled",
    ),
    Promise(
        "crashes",
        "a crash (kill -9) of the aggregator or a node in any phase",
        "the round completes, or is begun anew with fresh seeds; no mask is used twice, no record is lost",
        "crash recovery is not played here; the test suite kills real processes (secgeo/test_crash.py)",
    ),
    Promise(
        "strangers",
        "strangers on the network: no key, wrong key, garbage, half-open connections, oversized messages",
        "kept out; honest nodes go on",
    ),
    Promise(
        "other-names",
        "a revoked member, keys of an old roster, messages in another member's name",
        "not heard, or put out",
    ),
    Promise(
        "mixtures",
        "any mixture of losses, repetitions, tampering, delays, broken connections and crashes",
        "the exact sum of the survivors or a typed error that names the right party",
        "random schedules are not played here; the test suite does (adversary/test_stateful.py, protocols/test_schedules.py)",
    ),
    Promise(
        "decoders",
        "hostile bytes in any decoder: messages, keys, certificates, configurations, records, data files",
        "typed errors only, in bounded time and memory",
    ),
    Promise(
        "documents",
        "whoever hands a node a wrong agreement, roster (an old one too), certificate, anchor set or a weak study",
        "refused before training",
    ),
    Promise(
        "records",
        "whoever changes records afterwards",
        "any byte shows",
        "`secgeo verify` checks a folder of records; that every changed byte shows is tested by tests/audit",
    ),
    Promise(
        "secrets",
        "reader of key files, logs, arguments, representations",
        "no secret",
    ),
    Promise(
        "model",
        "reader of the released model",
        "(epsilon, delta)-DP per record or patient, add or remove one",
        "the audit of training tests it",
    ),
    Promise(
        "model-hospital",
        "the same, up to c hospitals included, where agreed",
        "(epsilon, delta)-DP per hospital, one hospital's updates zero",
        "the audit of training and `secgeo budget` test it",
    ),
    Promise(
        "budget",
        "a node that is started again and again, in many studies, at the same time, or killed between any two writes",
        "spends no more than its budget on any record; nothing is drawn that was not counted",
        "not played here; the test suite does (secgeo/test_budget.py)",
    ),
    Promise(
        "claims",
        "a node that claims too low an epsilon, leaves out an event or trains with other parameters",
        "found, and the event named",
        "`secgeo verify` and `secgeo budget verify` find it in a study's records",
    ),
    Promise(
        "rubbish-keys",
        "members that seal rubbish or bytes that are no key, claim other keys, or ask without end while the study key is dealt",
        "the others get their key; none is taken that is none, or after a round was begun",
    ),
)

COLLUSION = (
    Promise(
        "colluders",
        "Collusion: the aggregator follows the protocol",
        "fewer colluders than the threshold learn only what the sum and their own inputs imply",
    ),
    Promise(
        "deviating-colluders",
        "Collusion: the aggregator deviates",
        "privacy holds while 2t > n + c: no two survivor sets get t votes",
    ),
    Promise(
        "sparse",
        "Collusion: a sparse graph",
        "up to share_threshold - 1 colluders recover nothing, wherever they stand; 2t > n + share_threshold - 1",
    ),
    Promise(
        "no-colluders",
        "Collusion: homomorphic",
        "tolerates none, and the agreement says so; layered tolerates what masked does",
    ),
    Promise(
        "colluder-tags",
        "Collusion: the tags fall to one colluder",
        "privacy is untouched; the aggregator cannot deny what it signed",
    ),
    Promise(
        "honest-contributors",
        "Collusion: the sum of the other contributors is known to colluders",
        "the minimum cohort leaves at least two honest contributors beside as many colluders as are tolerated",
    ),
)
