"""``sewd-np plot`` and ``sewd-np explain``, and the evidence that a transcript keeps for them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import soundfile

import sewd_np
from sewd_np import cli, explain
from sewd_np.page import KINDS, page
from tests.test_transcribe import small_model

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small random model: quick, and its pictures are not what is tested here."""
    folder = tmp_path_factory.mktemp("small")
    small_model("ctc").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sound") / "noise & <tones>.wav"
    soundfile.write(path, np.random.default_rng(0).standard_normal(9000) / 10, 16_000)
    return str(path)


# -------------------------------------------------------------------------- evidence


def test_evidence_is_what_the_transcript_was_read_from() -> None:
    plain, kept = sewd_np.transcribe(cli.CLIP), sewd_np.transcribe(cli.CLIP, evidence=True)
    assert plain.evidence is None and kept.evidence is not None
    assert kept == plain and repr(kept) == repr(plain)
    evidence = kept.evidence
    assert len(evidence.wave_n) == kept.duration * evidence.sampling_rate
    assert evidence.log_probs_sv.dtype == np.float32 and evidence.log_probs_sv.shape[1] == len(evidence.tokens)
    np.testing.assert_allclose(np.exp(evidence.log_probs_sv).sum(axis=1), 1, rtol=1e-5)  # float32, 32 terms
    path = evidence.log_probs_sv.argmax(axis=1)
    letters = [evidence.tokens[t] for i, t in enumerate(path) if t != evidence.blank and (i == 0 or t != path[i - 1])]
    assert "".join(letters).replace("|", " ").strip() == kept.text
    assert evidence.seconds_per_frame == 0.02


def test_evidence_shares_no_memory_with_the_callers_array() -> None:
    wave_n = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    kept = sewd_np.transcribe(wave_n, model=small_model("ctc"), evidence=True)
    assert kept.evidence is not None and not np.shares_memory(kept.evidence.wave_n, wave_n)


def test_json_has_no_evidence(capsys: Captured) -> None:
    assert cli.main(["transcribe", str(cli.CLIP), "--output-format", "json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"file", "text", "words", "duration"}


# ------------------------------------------------------------------------------- plot


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(kind: str, small: str, noise: str, tmp_path: Path, capsys: Captured) -> None:
    picture = tmp_path / "picture.png"
    assert cli.main(["plot", kind, noise, "-o", str(picture), "--model", small, "--layer", "1", "--head", "1"]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_a_picture_shows_the_layer_head_and_seconds_that_were_asked_for(
    small: str, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plots = sewd_np.load(small), Mock()
    monkeypatch.setattr(explain, "plot", plots)
    for layer, head in ((1, 1), (0, 1), (None, 0)):
        seen = explain.look(model, small, noise, None, layer, head)
        shown, step = 1 if layer is None else layer, pytest.approx(0.04)  # of two layers the second is the middle one
        words, frames = seen.transcript, seen.trace["encoder.encoder.input"].shape[1]
        assert words is not None and words.evidence is not None and frames == 13
        for kind, name, positional, named in (
            ("transcript", "transcript", (words,), {}),
            ("features", "features", (seen.trace, model.config, words), {"sampling_rate": 16_000}),
            ("similarity", "similarity", (seen.trace, step), {}),
            ("heads", "heads", (seen.trace, None, step), {}),  # a page shows all of them
            ("attention", "attention", (seen.trace, shown, head, words), {"seconds_per_frame": step}),
            ("disentangle", "disentangle", (seen.trace, shown, head, step), {}),
            ("position-profile", "position_profile", (seen.trace, shown, step), {}),
            ("bucket-curve", "bucket_curve", (model.config,), {}),
            ("bucket-map", "bucket_map", (model.config, frames, step), {}),
        ):
            plots.reset_mock()
            assert explain.figure(seen, kind) is getattr(plots, name).return_value
            assert plots.mock_calls == [getattr(call, name)(*positional, **named)]
        explain.figure(seen, "compare")
        (ours, theirs), named = plots.compare.call_args
        assert list(ours) == list(theirs) and named == {"names": ("numba", "numpy, float64")}
        assert ours["lm_head"].dtype == np.float32 and theirs["lm_head"].dtype == np.float64
    explain.figure(explain.look(model, small, noise, "heads", 1), "heads")
    assert plots.heads.call_args.args[1] == 1


@pytest.mark.parametrize("ending, start", [(".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_other_formats(ending: str, start: bytes, small: str, tmp_path: Path) -> None:
    picture = tmp_path / f"picture{ending}"
    assert cli.main(["plot", "bucket-curve", "-o", str(picture), "--model", small]) == 0
    assert picture.read_bytes().startswith(start)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["heads", "nowhere.wav", "-o", "a.png"], "nowhere.wav"),
        (["heads", "-o", "a.jpg"], "'.jpg'; it must end in .pdf, .png, .svg"),
        (["heads", "-o", "nowhere/a.png"], "is in a folder that does not exist"),
        (["heads", "-o", "a.png", "--layer", "2"], "layer 2 does not exist; the model has 2"),
        (["heads", "-o", "a.png", "--head", "-1"], "head is -1; it must be a whole number"),
    ],
)
def test_mistakes_leave_no_file(
    arguments: list[str], said: str, small: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", *arguments, "--model", small]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_picture(small: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "folder.png").mkdir()
    assert cli.main(["plot", "heads", "-o", str(tmp_path / "folder.png"), "--model", small]) == 2
    assert "folder.png' is a folder; name a file in a folder that does" in capsys.readouterr().err


def test_pictures_of_no_kind_and_models_without_a_processor(small: str, noise: str) -> None:
    model = sewd_np.load(small)
    for call_it in (
        lambda: explain.look(model, small, noise, "head"),
        lambda: explain.figure(explain.look(model, small, noise, "bucket-curve"), "head"),
    ):
        with pytest.raises(ValueError, match=r"picture 'head' is unknown; choose one of transcript, .*compare"):
            call_it()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json, which says how sound must be prepared"):
        explain.look(small_model("ctc", processor=False), small, noise)


def test_a_failed_picture_keeps_the_old_one(tmp_path: Path) -> None:
    class Broken:
        def savefig(self, path: Path, format: str) -> None:
            path.write_bytes(b"half")
            raise OSError("the disk is full")

    picture = tmp_path / "a.png"
    picture.write_bytes(b"old")
    with pytest.raises(OSError, match="full"):
        explain.write_picture(Broken(), picture)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"old")]


def test_a_model_without_letters(tmp_path: Path, noise: str, capsys: Captured) -> None:
    folder = tmp_path / "classifier"
    small_model("classification").save_pretrained(folder)
    command = ["plot", "transcript", noise, "-o", str(tmp_path / "a.png"), "--model", str(folder)]
    assert cli.main(command) == 2
    assert "no CTC head" in capsys.readouterr().err
    assert cli.main(["explain", noise, "-o", str(tmp_path / "page"), "--model", str(folder)]) == 0
    drawn = {path.stem for path in (tmp_path / "page").iterdir()}
    assert drawn == {"index", *KINDS} - {"transcript"}
    text = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "for every letter" not in text and "the letters along both sides" not in text
    assert "for every label" in text and "<p>The model heard: <strong>" in text


def test_the_recording_may_stand_last(small: str, noise: str, tmp_path: Path) -> None:
    pictures = []
    for name, order in (("a.png", [noise, "-o"]), ("b.png", ["-o", noise])):
        path = str(tmp_path / name)
        arguments = [path if item == "-o" else item for item in order]
        arguments.insert(arguments.index(path), "-o")
        assert cli.main(["plot", "similarity", *arguments, "--model", small]) == 0
        pictures.append(Path(path).read_bytes())
    assert pictures[0] == pictures[1]
    with pytest.raises(SystemExit):
        cli.main(["plot", "similarity", noise, "-o", str(tmp_path / "c.png"), noise])


def test_without_matplotlib_one_line_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        f"from sewd_np import cli; sys.exit(cli.main(['explain', '-o', {str(tmp_path / 'page')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "sewd-np[plot]" in done.stderr


# ---------------------------------------------------------------------------- explain


def test_a_page_with_all_pictures(small: str, noise: str, tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "page"
    assert cli.main(["explain", noise, "-o", str(folder), "--model", small]) == 0
    explain.check_folder(folder)  # an earlier page may be replaced
    assert "open it in a browser" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"index.html", *(f"{kind}.png" for kind in KINDS)}
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'src="([^"]*)"', text) == [f"{kind}.png" for kind in KINDS]
    assert "noise &amp; &lt;tones&gt;.wav" in text and "<tones>" not in text
    assert "://" not in text and "<script" not in text and "<link" not in text
    for kind in KINDS.values():
        assert kind.title in text and 2 <= kind.caption.count(".") <= 8


def test_a_folder_of_other_files_is_left_alone(small: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "index.html").write_text("mine")
    assert cli.main(["explain", "-o", str(tmp_path), "--model", small]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("index.html", "mine")]


def test_an_earlier_pages_pictures_do_not_stay(small: str, noise: str, tmp_path: Path) -> None:
    """A classifier's page has no transcript; what else the folder holds is not ours to remove."""
    classifier, folder = tmp_path / "classifier", tmp_path / "page"
    small_model("classification").save_pretrained(classifier)
    assert cli.main(["explain", noise, "-o", str(folder), "--model", small]) == 0
    (folder / "notes.txt").touch()
    assert cli.main(["explain", noise, "-o", str(folder), "--model", str(classifier)]) == 0
    assert {path.name for path in folder.iterdir()} == {
        "index.html",
        "notes.txt",
        *(f"{kind}.png" for kind in KINDS if kind != "transcript"),
    }


def test_a_folder_may_be_a_disk_of_its_own(
    small: str, noise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdtemp(suffix: str | None, prefix: str, dir: Path) -> str:
        assert Path(dir) == folder, "from elsewhere nothing could be moved there"
        return real(suffix, prefix, dir)

    folder, real = tmp_path / "mounted", tempfile.mkdtemp
    folder.mkdir()
    (folder / ".sewd-np-left").mkdir()  # of a run that was killed
    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    assert cli.main(["explain", noise, "-o", str(folder), "--model", small]) == 0
    assert (folder / "index.html").is_file()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["plot", "bucket-curve", "-o", "a.png"], "'a.png' cannot be written (Read-only file system); name another"),
        (["explain", "-o", "page"], "'page' cannot be written (Read-only file system); name another place"),
        (["explain", "-o", "link"], "'link' is a link to nothing; name a folder"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_work(
    arguments: list[str], said: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), ".sewd-np-abc")

    def never(*arguments: object) -> None:
        raise AssertionError("work began")

    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nowhere")
    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    monkeypatch.setattr(cli, "_look", never)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1 and ".sewd-np" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere such names may not be made")
def test_a_file_name_that_is_not_utf8(small: str, noise: str, tmp_path: Path) -> None:
    recording, folder = tmp_path / os.fsdecode(b"caf\xe9.wav"), tmp_path / "page"
    shutil.copy(noise, recording)
    assert cli.main(["explain", str(recording), "-o", str(folder), "--model", small]) == 0
    assert "caf\\udce9.wav" in (folder / "index.html").read_text(encoding="utf-8")


def test_a_recording_that_cannot_be_used_makes_no_folder(small: str, tmp_path: Path, capsys: Captured) -> None:
    soundfile.write(tmp_path / "short.wav", np.zeros(700), 16_000)
    assert cli.main(["explain", str(tmp_path / "short.wav"), "-o", str(tmp_path / "page"), "--model", small]) == 2
    assert "720" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["short.wav"]


def test_a_page_escapes_what_was_heard() -> None:
    text = page(["heads"], "a", "<unk> & more", None, 0, 0)
    assert "&lt;unk&gt; &amp; more" in text
    assert "nothing" in page(["heads"], "a", "", None, 0, 0)
    assert "The model heard" not in page(["heads"], "a", None, None, 0, 0)
