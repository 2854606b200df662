import errno
import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys import files
from keys.errors import KeyFileError
from keys.labels import Label

SECRET = b"a secret of thirty-two bytes ...."
PASSPHRASE = b"correct horse battery staple"
PARAMETERS = len(Label.KEY_FILE) + 1


@pytest.fixture
def quick(monkeypatch):
    """The smallest scrypt cost that is accepted: 16 MiB."""
    monkeypatch.setattr(files, "SCRYPT_LOG2_N", files.SCRYPT_LOG2_N_ACCEPTED.start)


@pytest.fixture
def no_scrypt(monkeypatch):
    def refuse(**_parameters):
        pytest.fail("scrypt was called")

    monkeypatch.setattr(files, "Scrypt", refuse)


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request):
    old = os.umask(request.param)
    yield
    os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def flip(path: Path, position: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


def test_round_trip_encrypted_at_full_cost(tmp_path):
    path = tmp_path / "k"
    files.write_secret(path, SECRET, PASSPHRASE)
    assert files.read_secret(path, PASSPHRASE) == SECRET
    assert SECRET not in path.read_bytes()
    assert path.read_bytes()[PARAMETERS : PARAMETERS + 3] == bytes([17, 8, 1])


def test_round_trip_in_clear_ignores_a_passphrase(tmp_path):
    files.write_secret(tmp_path / "k", SECRET, None)
    assert files.read_secret(tmp_path / "k", None) == files.read_secret(tmp_path / "k", PASSPHRASE) == SECRET


def test_two_files_of_one_secret_share_nothing(tmp_path, quick):
    files.write_secret(tmp_path / "a", SECRET, PASSPHRASE)
    files.write_secret(tmp_path / "b", SECRET, PASSPHRASE)
    start = PARAMETERS + 3
    a, b = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    assert a[start : start + 16] != b[start : start + 16]
    assert a[start + 28 :] != b[start + 28 :]


def test_mode_is_0600_under_any_umask(tmp_path, umask):
    files.write_secret(tmp_path / "k", SECRET, None)
    files.write_public(tmp_path / "p", b"public")
    assert mode(tmp_path / "k") == 0o600
    assert mode(tmp_path / "p") == 0o644


def test_file_is_never_created_with_a_looser_mode(tmp_path, monkeypatch):
    """Between creation and the change of mode, nobody else may open it."""
    seen = []
    old_umask, fchmod = os.umask(0), os.fchmod

    def spy(descriptor, new):
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fchmod(descriptor, new)

    monkeypatch.setattr(os, "fchmod", spy)
    try:
        files.write_secret(tmp_path / "k", SECRET, None)
    finally:
        os.umask(old_umask)
    assert seen == [0o600]


def test_never_overwrites(tmp_path):
    path = tmp_path / "k"
    files.write_secret(path, SECRET, None)
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match="exists already"):
        files.write_secret(path, b"other", None)
    assert path.read_bytes() == before


def test_does_not_write_through_a_planted_link(tmp_path):
    (tmp_path / "k").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError):
        files.write_secret(tmp_path / "k", SECRET, None)
    assert not (tmp_path / "elsewhere").exists()


def test_file_and_directory_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(stat.S_IFMT(os.fstat(fd).st_mode)))
    files.write_secret(tmp_path / "k", SECRET, None)
    files.write_public(tmp_path / "p", b"public")
    assert synced == [stat.S_IFREG, stat.S_IFDIR] * 2


def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    files.write_public(tmp_path / "p", b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        files.write_secret(tmp_path / "k", SECRET, None)
    with pytest.raises(KeyFileError, match="No space left"):
        files.write_public(tmp_path / "p", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    assert (tmp_path / "p").read_bytes() == b"old"


@pytest.mark.parametrize("loose", [0o640, 0o604, 0o660, 0o644, 0o666, 0o601, 0o700, 0o4600, 0o1600])
def test_looser_mode_is_refused(tmp_path, loose):
    path = tmp_path / "k"
    files.write_secret(path, SECRET, None)
    path.chmod(loose)
    with pytest.raises(KeyFileError, match="0600"):
        files.read_secret(path, None)
    with pytest.raises(KeyFileError, match="0600"):
        files.read_passphrase_file(path)


def test_tighter_mode_is_accepted(tmp_path):
    path = tmp_path / "k"
    files.write_secret(path, SECRET, None)
    path.chmod(0o400)
    assert files.read_secret(path, None) == SECRET


def test_file_of_another_user_is_refused(tmp_path, monkeypatch):
    files.write_secret(tmp_path / "k", SECRET, None)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(KeyFileError, match="another user"):
        files.read_secret(tmp_path / "k", None)


def test_link_missing_directory_and_fifo_are_refused(tmp_path):
    files.write_secret(tmp_path / "k", SECRET, None)
    (tmp_path / "link").symlink_to(tmp_path / "k")
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "directory").mkdir(0o600)
    for name, reason in {
        "link": "symbolic link",
        "none": "does not exist",
        "fifo": "not a regular file",
        "directory": "not a regular file",
    }.items():
        with pytest.raises(KeyFileError, match=reason):
            files.read_secret(tmp_path / name, None)
    with pytest.raises(KeyFileError, match="not a regular file"):
        files.read_public(tmp_path / "fifo")


def test_wrong_or_missing_passphrase(tmp_path, quick):
    path = tmp_path / "k"
    files.write_secret(path, SECRET, PASSPHRASE)
    for wrong in (PASSPHRASE + b" ", PASSPHRASE[:-1], PASSPHRASE.upper()):
        with pytest.raises(KeyFileError, match="wrong passphrase") as caught:
            files.read_secret(path, wrong)
        assert wrong.decode() not in str(caught.value)
    with pytest.raises(KeyFileError, match="is encrypted"):
        files.read_secret(path, None)
    with pytest.raises(KeyFileError, match="empty passphrase"):
        files.read_secret(path, b"")
    with pytest.raises(KeyFileError, match="empty passphrase"):
        files.write_secret(tmp_path / "other", SECRET, b"")
    assert not (tmp_path / "other").exists()


def test_every_byte_of_a_clear_file_is_guarded(tmp_path):
    path = tmp_path / "k"
    files.write_secret(path, SECRET, None)
    for position in range(len(path.read_bytes())):
        flip(path, position)
        with pytest.raises(KeyFileError):
            files.read_secret(path, PASSPHRASE)
        flip(path, position)
    assert files.read_secret(path, None) == SECRET


def test_bytes_of_an_encrypted_file_are_guarded(tmp_path, quick):
    path = tmp_path / "k"
    files.write_secret(path, SECRET, PASSPHRASE)
    size = len(path.read_bytes())
    header = range(PARAMETERS + 3)
    for position in [
        *header,
        PARAMETERS + 3,
        PARAMETERS + 18,
        PARAMETERS + 19,
        PARAMETERS + 30,
        PARAMETERS + 31,
        size - 1,
    ]:
        flip(path, position)
        with pytest.raises(KeyFileError):
            files.read_secret(path, PASSPHRASE)
        flip(path, position)
    assert files.read_secret(path, PASSPHRASE) == SECRET


def test_an_encrypted_file_cannot_be_relabelled_as_clear(tmp_path, quick):
    """Changing the kind must not hand out attacker-chosen bytes as a key."""
    path = tmp_path / "k"
    files.write_secret(path, SECRET, PASSPHRASE)
    flip(path, PARAMETERS - 1)
    with pytest.raises(KeyFileError, match="changed or is damaged"):
        files.read_secret(path, PASSPHRASE)


@pytest.mark.parametrize(
    "parameters", [(31, 8, 1), (63, 8, 1), (255, 255, 255), (19, 8, 1), (17, 255, 1), (17, 8, 255)]
)
def test_hostile_scrypt_parameters_are_refused_before_any_work(tmp_path, no_scrypt, parameters):
    path = tmp_path / "k"
    path.touch(0o600)
    path.write_bytes(Label.KEY_FILE + b"\1" + bytes(parameters) + bytes(28 + 48))
    started = time.perf_counter()
    with pytest.raises(KeyFileError, match="out of bounds"):
        files.read_secret(path, PASSPHRASE)
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("parameters", [(0, 8, 1), (1, 8, 1), (13, 8, 1), (17, 0, 1), (17, 1, 1), (17, 8, 0)])
def test_weak_scrypt_parameters_are_refused(tmp_path, no_scrypt, parameters):
    path = tmp_path / "k"
    path.touch(0o600)
    path.write_bytes(Label.KEY_FILE + b"\1" + bytes(parameters) + bytes(28 + 48))
    with pytest.raises(KeyFileError, match="out of bounds"):
        files.read_secret(path, PASSPHRASE)


@pytest.mark.parametrize(
    ("salt", "nonce", "ciphertext", "reason"),
    [
        (bytes(16), bytes([1]) * 12, bytes(48), "zeros"),
        (bytes([1]) * 16, bytes(12), bytes(48), "zeros"),
        (bytes([1]) * 16, bytes([1]) * 12, b"", "cut off"),
        (bytes([1]) * 16, bytes([1]) * 12, bytes(15), "cut off"),
    ],
)
def test_an_encrypted_file_without_salt_nonce_or_secret_is_refused(
    tmp_path, no_scrypt, salt, nonce, ciphertext, reason
):
    path = tmp_path / "k"
    path.touch(0o600)
    path.write_bytes(Label.KEY_FILE + b"\1" + bytes((17, 8, 1)) + salt + nonce + ciphertext)
    with pytest.raises(KeyFileError, match=reason):
        files.read_secret(path, PASSPHRASE)


def test_what_shows_of_a_key_file_without_its_passphrase(tmp_path, quick):
    files.write_secret(tmp_path / "clear", SECRET, None)
    files.write_secret(tmp_path / "sealed", SECRET, PASSPHRASE)
    clear, sealed = (
        files.parse_key_file(tmp_path / name, (tmp_path / name).read_bytes()) for name in ("clear", "sealed")
    )
    assert (clear.encrypted, clear.log2_n, clear.secret_bytes) == (False, 0, len(SECRET))
    assert (sealed.encrypted, sealed.log2_n, sealed.secret_bytes) == (True, files.SCRYPT_LOG2_N, len(SECRET))
    assert SECRET.decode() not in repr(clear)


@given(st.binary(max_size=200), st.sampled_from([b"", Label.KEY_FILE, Label.KEY_FILE + b"\0", Label.KEY_FILE + b"\1"]))
def test_garbage_is_refused(tmp_path_factory, garbage, prefix):
    path = tmp_path_factory.mktemp("garbage") / "k"
    path.touch(0o600)
    path.write_bytes(prefix + garbage)
    with pytest.raises(KeyFileError):
        files.read_secret(path, None)


def test_sizes_are_bounded(tmp_path):
    with pytest.raises(KeyFileError, match="too many"):
        files.write_secret(tmp_path / "k", bytes(files.KEY_FILE_LIMIT_BYTES), None)
    (tmp_path / "k").touch(0o600)
    (tmp_path / "k").write_bytes(bytes(files.KEY_FILE_LIMIT_BYTES + 1))
    with pytest.raises(KeyFileError, match="larger than"):
        files.read_secret(tmp_path / "k", None)
    files.write_public(tmp_path / "p", bytes(10))
    assert files.read_public(tmp_path / "p", 10) == bytes(10)
    with pytest.raises(KeyFileError, match="larger than"):
        files.read_public(tmp_path / "p", 9)


def test_public_file_is_replaced_whole(tmp_path):
    for data in (b"one", b"two, longer", b""):
        files.write_public(tmp_path / "p", data)
        assert (tmp_path / "p").read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    with pytest.raises(KeyFileError):
        files.write_public(tmp_path / "missing" / "p", b"")
    with pytest.raises(KeyFileError):
        files.write_secret(tmp_path / "missing" / "k", b"", None)


@pytest.mark.parametrize(
    ("content", "passphrase"),
    [(b"word\n", b"word"), (b"word", b"word"), (b"two words \n\n", b"two words \n"), (b"\xff\x00\n", b"\xff\x00")],
)
def test_passphrase_file_loses_one_newline(tmp_path, content, passphrase):
    (tmp_path / "p").touch(0o600)
    (tmp_path / "p").write_bytes(content)
    assert files.read_passphrase_file(tmp_path / "p") == passphrase


@pytest.mark.parametrize("content", [b"", b"\n", bytes(files.PASSPHRASE_LIMIT_BYTES + 1)])
def test_passphrase_file_empty_or_huge_is_refused(tmp_path, content):
    (tmp_path / "p").touch(0o600)
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(KeyFileError):
        files.read_passphrase_file(tmp_path / "p")
