"""The inputs of the vectors over tags, whole uploads and graphs."""

from __future__ import annotations

from collections.abc import Iterator

from tests.vectors import reference
from tests.vectors.cases import ATTEMPT, COHORT, DIGEST, MIDDLE, NARROW, WIDE, Case, case, named, refused
from tests.vectors.codec import coins


def _ramp(count: int, value_bits: int = 24) -> dict[str, int]:
    """Encodings, from 1 to 2^value_bits - 1 or nearly, without an end in sight."""
    return {"first": 1, "step": 40_503, "modulus": 2**value_bits - 1, "count": count}


def tags() -> Iterator[Case]:
    seed = coins("tags")(32)
    base = {"seed": seed, "attempt": ATTEMPT}
    yield case("the two keys, and what they give", "tag_keys", **base)
    yield case("another attempt, other keys", "tag_keys", seed=seed, attempt=[DIGEST, 3, 3])
    yield case("no values: the tag is 0", "tag", **base, values=[], start=0)
    yield case("a single 1 gives the sum of R[0, j] C[0, j]", "tag", **base, values=[1], start=0)
    yield case("three values", "tag", **base, values=[1, 2**24 - 1, 8_388_608], start=0)
    yield case(
        "the largest sums of a whole row",
        "tag",
        **base,
        values={"first": 2**32 - 1, "step": 0, "modulus": 2**32, "count": 1024},
        start=0,
    )
    yield case("three rows, the last one not full", "tag", **base, values=_ramp(2050), start=0)
    yield case("the same values two rows further on", "tag", **base, values=_ramp(2050), start=2048)
    yield case("a dealer's commitment", "tag_commitment", seed=seed, attempt=ATTEMPT, dealer="hospital-00")
    yield case(
        "another dealer's commitment to the same seed",
        "tag_commitment",
        seed=seed,
        attempt=ATTEMPT,
        dealer="hospital-01",
    )
    vectors = [[1, 5_000_000, 2**24 - 1], [8_388_608, 8_388_609, 3], [77, 12_345_678, 9_999_999]]
    pad = reference.tag_pad(seed, ATTEMPT)
    numbers = [(reference.tag(seed, ATTEMPT, vector) + pad) % reference.TAG_PRIME for vector in vectors]
    total, tag = [sum(column) for column in zip(*vectors, strict=True)], sum(numbers) % reference.TAG_PRIME
    given = {**base, "contributors": 3}
    yield case(
        "the tag of a sum is the sum of the tags: three nodes",
        "check_tag",
        **given,
        total=total,
        tag_total=tag.to_bytes(8),
    )
    for changed, other, why in (
        ([total[0] + 1, *total[1:]], tag, "a value of the sum is one higher"),
        ([total[1], total[0], total[2]], tag, "two values of the sum have changed places"),
        ([total[0] + 1, total[1] - 1, total[2]], tag, "one value up, one down"),
        (total, tag + 1, "the tag is one higher"),
        ([2 * v for v in total], 2 * tag % reference.TAG_PRIME, "twice the sum with twice its tag"),
        (vectors[0], tag, "one node's vector instead of the sum"),
        ([t - v for t, v in zip(total, vectors[0], strict=True)], tag, "one node's vector is missing from the sum"),
    ):
        yield refused("VerificationFailed", why, "check_tag", **given, total=changed, tag_total=other.to_bytes(8))
    yield refused(
        "VerificationFailed",
        "the seed of another attempt",
        "check_tag",
        seed=seed,
        attempt=[DIGEST, 3, 3],
        contributors=3,
        total=total,
        tag_total=tag.to_bytes(8),
    )
    keys = [coins(f"tags {place}")(32) for place in range(3)]
    masks = {"added": keys[:2], "subtracted": keys[2:], "attempt": ATTEMPT, "tag_seed": seed}
    yield case(
        "one chunk, and its tag, both masked",
        "upload",
        encoding=WIDE,
        chunk_values=1024,
        encoded=_ramp(5),
        **masks,
    )
    yield case(
        "20-bit ring, two chunks, the last one not full",
        "upload",
        encoding=NARROW,
        chunk_values=1024,
        encoded=_ramp(2046, 17),
        **masks,
    )
    yield case(
        "24-bit ring, one full chunk",
        "upload",
        encoding=MIDDLE,
        chunk_values=1024,
        encoded=_ramp(1024, 20),
        **masks,
    )


def graph() -> Iterator[Case]:
    yield case("four nodes, complete graph: 0 neighbours were agreed", "graph", names=named(4), degree=0, cohort=COHORT)
    yield case("the order follows from the cohort digest", "graph", names=named(4), degree=0, cohort=DIGEST)
    yield case("nine nodes with four neighbours", "graph", names=named(9), degree=4, cohort=COHORT)
    yield case("the order in which the names come is nothing", "graph", names=named(9)[::-1], degree=4, cohort=COHORT)
    yield case("as many neighbours as there are others: complete", "graph", names=named(5), degree=4, cohort=COHORT)
    yield case("twenty nodes with eight neighbours", "graph", names=named(20), degree=8, cohort=COHORT)
    circle = reference.order(named(20), COHORT)
    sparse = {"names": named(20), "degree": 8, "cohort": COHORT}
    for lost, colluders, why in (
        ([], 4, "nobody is lost, four collude"),
        ([], 7, "nobody is lost; seven may collude: eight survivors are left in two stretches of four"),
        ([], 8, "eight colluders may fill two stretches of four places, and cut the others apart"),
        ([0], 5, "one is lost: a stretch holds three survivors, and five may collude"),
        ([0], 6, "one is lost: six colluders are too many"),
        ([0, 1], 3, "two neighbours in the circle are lost, three collude"),
        ([0, 1], 4, "two neighbours in the circle are lost, four collude"),
        ([0, 10], 4, "two far from each other are lost, four collude"),
        ([0, 1, 2], 1, "three in a row are lost, one colludes"),
        ([0, 1, 2], 2, "three in a row are lost, two collude"),
        ([0, 1, 2, 3], 0, "a whole stretch of four places is lost"),
        ([18, 19, 0, 1], 0, "a stretch across the end of the circle is lost"),
    ):
        alive = sorted(set(named(20)) - {circle[place] for place in lost})
        yield case(why, "tolerates", **sparse, survivors=alive, colluders=colluders)
    yield case(
        "a complete graph cannot be cut apart",
        "tolerates",
        names=named(4),
        degree=0,
        cohort=COHORT,
        survivors=named(3),
        colluders=2,
    )
    for members, threshold, degree, shares, why in (
        (4, 3, 0, 0, "four members, threshold 3: one may collude"),
        (16, 12, 0, 0, "sixteen members, complete graph: 2 * 12 - 16 - 1 may collude"),
        (17, 11, 8, 4, "seventeen members with eight neighbours, of whom four recover a secret: three may collude"),
        (20, 12, 8, 4, "the least threshold for twenty members and four shares"),
        (64, 40, 24, 16, "what is recommended for 64 members"),
        (20, 11, 18, 2, "all neighbours but one, and two shares"),
    ):
        yield case(why, "agreed_graph", members=members, threshold=threshold, degree=degree, share_threshold=shares)
    for members, threshold, degree, shares, why in (
        (4, 2, 0, 0, "half of the members sign: a colluder could have two survivor sets signed"),
        (5, 3, 0, 0, "threshold 3 of 5: a colluder who votes twice is enough for two survivor sets"),
        (4, 5, 0, 0, "more votes than there are members"),
        (20, 12, 0, 4, "share_threshold without neighbours"),
        (16, 12, 8, 4, "sixteen members have a complete graph"),
        (20, 12, 7, 4, "an odd number of neighbours stands on no circle"),
        (20, 12, 2, 2, "two neighbours: the circle is cut by two colluders"),
        (20, 12, 19, 4, "as many neighbours as there are others is the complete graph, which is 0"),
        (20, 12, 20, 4, "more neighbours than there are others"),
        (20, 12, 8, 0, "no share_threshold"),
        (20, 12, 8, 1, "one share is the secret"),
        (20, 15, 8, 9, "more shares than neighbours"),
        (20, 11, 8, 4, "the least threshold less one: three colluders could have two survivor sets signed"),
        (64, 39, 24, 16, "the same for 64 members"),
    ):
        yield refused(
            "ConfigError",
            why,
            "agreed_graph",
            members=members,
            threshold=threshold,
            degree=degree,
            share_threshold=shares,
        )
