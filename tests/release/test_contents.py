"""What of a folder becomes public: a list of a model's files, no links, no paths of this machine, no token."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hub_server import TOKEN

from weightport import cli
from weightport.api import release
from weightport.errors import CheckpointError, UsageError
from weightport.local_paths import shortened
from weightport.release import ReleaseOptions
from weightport.release.contents import PublishedFile

REPO = "somebody/ofa-tiny"
DRY = ReleaseOptions(REPO, licence="mit", dry_run=True)


def dry_run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.port_release, [*map(str, arguments), "--repo", REPO, "--dry-run"])


def published(model: Path, options: ReleaseOptions = DRY) -> dict[str, PublishedFile]:
    return {file.name: file for file in release(model, options).files}


def content(file: PublishedFile) -> bytes:
    return file.content if file.content is not None else Path(str(file.path)).read_bytes()


def test_what_does_not_belong_to_a_model_is_left_out_and_named(model: Path) -> None:
    strangers = [
        "credentials.json",
        "secrets.txt",
        "train_private.py",
        "notes.md",
        "optimizer.pt",
        "other.safetensors",
    ]
    for name in [*strangers, ".netrc", "training_args.bin"]:
        (model / name).write_text("private")
    (model / "photos").mkdir()
    names = set(published(model))
    assert not names & {*strangers, ".netrc", "training_args.bin", "photos"}
    done = dry_run(model)
    line = next(line for line in done.output.splitlines() if line.startswith("left out"))
    for name in ("credentials.json", "secrets.txt", "train_private.py", ".netrc", "photos/"):
        assert name in line


def test_everything_that_a_conversion_wrote_is_published(model: Path) -> None:
    # All but the list of what weightport wrote there, which is of use on this machine alone.
    wrote = {path.name for path in model.iterdir()} - {".weightport.json"}
    assert wrote <= set(published(model))


def test_tokenizers_licences_templates_and_reports_belong_to_a_model(model: Path) -> None:
    names = ["merges.txt", "vocab.json", "LICENSE", "LICENSE.md", "NOTICE.txt", "parity.html", "spiece.model"]
    for name in names:
        (model / name).write_text("x" if not name.endswith(".json") else "{}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("x")
    assert {*names, "additional_chat_templates/tools.jinja"} <= set(published(model))


def test_code_that_the_configuration_names_goes_along_with_what_it_imports(tmp_path: Path) -> None:
    from weightport.release.belonging import belonging

    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_mine.Mine"}}))
    (tmp_path / "modeling_mine.py").write_text("from .layers import Layer\nfrom .absent import x\n")
    for name in ("layers.py", "train_private.py"):
        (tmp_path / name).write_text("raise SystemExit('this was executed')")
    assert set(belonging(tmp_path, ())) == {"config.json", "modeling_mine.py", "layers.py"}


def test_a_further_file_is_published_when_it_is_named(model: Path) -> None:
    (model / "results.png").write_bytes(b"png")
    options = ReleaseOptions(REPO, include=("results.png",), dry_run=True)
    assert "results.png" in published(model, options)
    for name, message in (("absent.png", "there is no such file"), ("../x", "the name of a file")):
        with pytest.raises(UsageError, match=message):
            release(model, ReleaseOptions(REPO, include=(name,), dry_run=True))


@pytest.mark.parametrize("name", ["vocab.txt", "LICENSE", "metrics.json"])
def test_link_out_of_the_folder_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("{}")
    (model / name).symlink_to(secret)
    with pytest.raises(
        CheckpointError, match=rf"{name} is a link out of the folder, to .*id_rsa: it is not published"
    ):
        release(model, DRY)


def test_snapshot_in_the_hubs_cache_is_a_folder_of_links_and_published(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for place, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(place))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(place)))
    assert {"config.json", "model.safetensors"} <= set(published(snapshot))


def test_no_path_of_this_machine_becomes_public(model: Path) -> None:
    home = "/home/me/private/checkpoints"
    record = json.loads((model / "conversion.json").read_text())
    record["options"]["restore_file"] = f"{home}/best.pt"
    record["notes"] = [f"Vocabulary of {home}/BPE, see https://example.org/home/me/x"]
    record["parity"] = {"json": "../../private/parity.json"}
    (model / "conversion.json").write_text(json.dumps(record))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": home}))
    (model / "parity.html").write_text(f"<p>{home}/out</p><a href='https://example.org/home/me/x'>")
    (model / "merge.json").write_text(json.dumps({"base": {"name": f"{home}/base"}, "files": []}))
    files = published(model)
    everything = b"".join(content(file) for file in files.values() if file.size < 1 << 20)
    assert b"/home/me/private" not in everything and b"../private" not in everything
    shown = json.loads(content(files["conversion.json"]))
    assert shown["options"]["restore_file"] == "best.pt" and shown["parity"]["json"] == "parity.json"
    assert shown["notes"] == ["Vocabulary of BPE, see https://example.org/home/me/x"]
    assert shown["steps"] == record["steps"] and shown["files"] == record["files"]
    assert "conversion.json · " in dry_run(model).output and "local paths shortened" in dry_run(model).output
    assert f"{home}/best.pt" in (model / "conversion.json").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/base", "base"),
        ("~/models/base", "base"),
        ("C:\\Users\\me\\base", "base"),
        ("from /mnt/data/x.pt, then", "from x.pt, then"),
        ("org/name", "org/name"),
        ("a/b/c and 1/2/3", "a/b/c and 1/2/3"),
        ("https://example.org/home/me", "https://example.org/home/me"),
        ("</s>/unusual/thing", "</s>/unusual/thing"),
        ("encoder.layers.*.fc1/weight/x", "encoder.layers.*.fc1/weight/x"),
    ],
)
def test_local_paths_are_told_from_other_text(text: str, expected: str) -> None:
    assert shortened(text) == expected


def test_record_that_holds_a_token_is_not_published(model: Path) -> None:
    (model / "metrics.json").write_text(json.dumps({"CIDEr": 1.25, "command": f"HF_TOKEN={TOKEN} train"}))
    with pytest.raises(CheckpointError, match=r"metrics\.json holds an access token"):
        release(model, DRY)


@pytest.mark.parametrize("name", ["conversion.json", "merge.json", "parity.json", "training.json", "metrics.json"])
@pytest.mark.parametrize(
    "record",
    [[], 1, {"files": 1}, {"files": [1]}, {"source": 1}, {"adapters": [{}]}, {"comparisons": [{}]}, {"recipe": {}}],
)
def test_record_that_was_edited_is_one_error_or_nothing(name: str, record: Any, model: Path) -> None:
    (model / name).write_text(json.dumps(record))
    try:
        release(model, DRY)
    except CheckpointError as error:
        assert "not laid out as weightport writes" in str(error)


def test_card_of_the_users_own_is_not_replaced(model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: mit\n---\n# My model, in my own words\n")
    with pytest.raises(UsageError, match="is not a card that port-release wrote"):
        release(model, DRY)


def test_card_that_was_edited_after_its_release_is_not_replaced(model: Path) -> None:
    card = model / "README.md"
    card.write_text(release(model, DRY).card)
    assert "README.md" in published(model)
    card.write_text(card.read_text().replace("## ", "## My ", 1))
    with pytest.raises(UsageError, match="was edited since"):
        release(model, DRY)


def test_dry_run_says_where_to_and_how_large_to_the_byte(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example.org")
    done = CliRunner().invoke(cli.port_release, [str(model), "--repo", REPO, "--private", "--dry-run"])
    assert f"to       https://hub.example.org/{REPO} · private" in done.output
    for file in published(model, ReleaseOptions(REPO, dry_run=True)).values():
        assert len(content(file)) == file.size
        assert f"file     {file.name} · " in done.output
    assert not (model / "README.md").exists() and os.listdir(model)
