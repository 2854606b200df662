"""The one registry of domain-separation labels.

Every signature, key derivation, commitment and digest starts with one of these labels, so that bytes made for one purpose
never pass for another. Each label ends in a version; a changed meaning gets a new version, never the old name.
"""

from enum import Enum, unique


@unique
class Label(bytes, Enum):
    """A domain-separation label: a prefix-free, NUL-terminated ASCII string."""

    # keys
    ENROLMENT_REQUEST = b"secgeo/enrolment-request/v1\0"
    CURVE_BINDING = b"secgeo/curve-binding/v1\0"
    ROSTER = b"secgeo/roster/v1\0"
    KEY_FILE = b"secgeo/key-file/v1\0"
    # signed documents and records
    AGREEMENT = b"secgeo/agreement/v1\0"
    MANIFEST = b"secgeo/manifest/v1\0"
    TRANSCRIPT = b"secgeo/transcript/v1\0"
    LEDGER = b"secgeo/ledger/v1\0"
    RECEIPT = b"secgeo/receipt/v1\0"
    AUDIT = b"secgeo/audit/v1\0"
    # the secure sum
    MESSAGE = b"secgeo/message/v1\0"
    MESSAGE_BATCH = b"secgeo/message-batch/v1\0"
    COHORT = b"secgeo/cohort/v1\0"
    UNMASKED_COHORT = b"secgeo/unmasked-cohort/v1\0"
    PAIR_KEY = b"secgeo/pair-key/v1\0"
    PAIR_CONTRIBUTION = b"secgeo/pair-contribution/v1\0"
    CONTRIBUTION_DIGEST = b"secgeo/contribution-digest/v1\0"
    PAIR_SEED = b"secgeo/pair-seed/v1\0"
    SELF_SEED = b"secgeo/self-seed/v1\0"
    SELF_SEED_COMMITMENT = b"secgeo/self-seed-commitment/v1\0"
    SHARE_DIGEST = b"secgeo/share-digest/v1\0"
    SEAL_SHARES = b"secgeo/seal-shares/v1\0"
    SEAL_CONTRIBUTION = b"secgeo/seal-contribution/v1\0"
    SENDERS = b"secgeo/senders/v1\0"
    GRAPH = b"secgeo/graph/v1\0"
    TAG_KEY = b"secgeo/tag-key/v1\0"
    TAG_COMMITMENT = b"secgeo/tag-commitment/v1\0"
    STUDY_KEY = b"secgeo/study-key/v1\0"
    SEAL_STUDY_KEY = b"secgeo/seal-study-key/v1\0"
    KEEP_STUDY_KEY = b"secgeo/keep-study-key/v1\0"
    STUDY_TAG_SEED = b"secgeo/study-tag-seed/v1\0"
    STUDY_TAG_PAD = b"secgeo/study-tag-pad/v1\0"
    SURVIVORS = b"secgeo/survivors/v1\0"
    UPLOAD = b"secgeo/upload/v1\0"
    AGGREGATE = b"secgeo/aggregate/v1\0"
    # the model and its public data
    TRUNK = b"secgeo/trunk/v1\0"
    ANCHORS = b"secgeo/anchors/v1\0"
    DATASET = b"secgeo/dataset/v1\0"
