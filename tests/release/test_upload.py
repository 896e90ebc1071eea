"""What reaches the Hub, against a local server that speaks its protocol: uploads that drop, refusals, known hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hub_server import DROP, STALL, TEAR, TOKEN, HubServer
from safetensors.torch import load_file, save_file

from weightport import cli
from weightport.api import release, verify
from weightport.errors import CheckpointError, CoverageError, OutputError, UsageError
from weightport.integrity.file_hashes import check_hashes
from weightport.integrity.recorded_hashes import recorded_hashes
from weightport.release import ReleaseOptions
from weightport.release.publishing import command

REPO = "somebody/ofa-tiny"


def port_release(*arguments: object) -> Result:
    return CliRunner().invoke(cli.port_release, [str(argument) for argument in arguments])


@pytest.fixture
def sharded(model: Path) -> Path:
    """The model in two shards, without the record of the one file."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    shards = [f"model-0000{place}-of-00002.safetensors" for place in (1, 2)]
    for shard, half in zip(shards, halves):
        save_file({name: tensors[name] for name in half}, model / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, half in zip(shards, halves) for name in half}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()
    (model / "conversion.json").unlink()
    return model


def test_upload_is_one_commit_of_exactly_what_the_dry_run_lists(model: Path, hub: HubServer) -> None:
    shown = release(model, ReleaseOptions(REPO, revision="v1", dry_run=True))
    assert not hub.requests
    done = release(model, ReleaseOptions(REPO, private=True, revision="v1"))
    stored = hub.files[(REPO, "v1")]
    assert {name: len(content) for name, content in stored.items()} == {f.name: f.size for f in shown.files}
    assert {"modeling_ofa.py", "config.json", "README.md", "model.safetensors"} <= set(stored)
    assert "auto_map" in json.loads(stored["config.json"]) and stored["README.md"].decode() == done.card == shown.card
    assert hub.repositories == {REPO: {"private": True}}
    assert len(hub.asked("POST", "/commit/")) == 1 and hub.asked("POST", "/branch/v1")
    assert done.url == f"{hub.url}/{REPO}/tree/v1"
    assert {name: (model / name).read_bytes() for name in stored} == stored


def test_what_was_published_is_verified_after_its_download_to_the_last_bit(
    model: Path, hub: HubServer, tmp_path: Path
) -> None:
    (model / "training.json").write_text(json.dumps({"data": {"path": "/home/me/data/train.jsonl"}}))
    release(model, ReleaseOptions(REPO))
    assert verify(model).passed
    download = tmp_path / "download"
    download.mkdir()
    stored = hub.files[(REPO, "main")]
    for name, content in stored.items():
        (download / name).write_bytes(content)
    assert "/home/me" not in (download / "training.json").read_text()
    found = verify(download)
    assert found.passed and set(found.hashed) == set(stored) - {"SHA256SUMS"} and not found.findings
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=download, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in stored:
        content = bytearray(stored[name])
        content[len(content) // 2] ^= 4
        (download / name).write_bytes(content)
        recorded, findings = recorded_hashes(download)
        findings += check_hashes(download, recorded, {}, lambda amount: None)
        assert name in {each.subject for each in findings} or (name == "SHA256SUMS" and findings)
        (download / name).write_bytes(stored[name])


def test_sums_of_somebody_else_s_are_not_replaced(model: Path) -> None:
    (model / "SHA256SUMS").write_text("mine\n")
    with pytest.raises(UsageError, match="SHA256SUMS is not one that port-release wrote"):
        release(model, ReleaseOptions(REPO, dry_run=True))


def test_what_changed_since_it_was_written_is_said_before_it_is_public(model: Path) -> None:
    settings = model / "generation_config.json"
    settings.write_text(settings.read_text().replace("{", '{"max_new_tokens": 7,', 1))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    found = release(model, ReleaseOptions(REPO, dry_run=True)).checked.warnings
    assert [each.partition(":")[0] for each in found] == ["config.json", "generation_config.json"]
    assert "warning  generation_config.json: was changed" in port_release(model, "--repo", REPO, "--dry-run").output


def test_a_processor_of_another_model_is_not_published(model: Path) -> None:
    path = model / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["size"] = {"height": 4096, "width": 4096}
    path.write_text(json.dumps(settings))
    with pytest.raises(CoverageError, match="processor: Pictures of 4096 × 4096 pixels give"):
        release(model, ReleaseOptions(REPO, dry_run=True))


def test_weights_are_hashed_once(model: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import lfs

    read: list[str] = []
    hashing = lfs.sha_fileobj
    monkeypatch.setattr(lfs, "sha_fileobj", lambda file, *rest: read.append(file.name) or hashing(file, *rest))
    release(model, ReleaseOptions(REPO))
    assert not [name for name in read if name.endswith(".safetensors")]
    content = (model / "model.safetensors").read_bytes()
    assert hub.objects == {hashlib.sha256(content).hexdigest(): content}


@pytest.mark.parametrize("how", ["written", "replaced by one with the same size and time"])
def test_weights_that_change_while_they_are_uploaded_are_not_published(how: str, model: Path, hub: HubServer) -> None:
    path = model / "model.safetensors"

    def change() -> None:
        before, content = path.stat(), bytearray(path.read_bytes())
        content[-1] ^= 1
        if how == "written":
            path.write_bytes(content)
        else:
            (model / "new").write_bytes(content)
            (model / "new").replace(path)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    hub.on_put = change
    with pytest.raises(CheckpointError, match="changed while it was released"):
        release(model, ReleaseOptions(REPO))
    assert not hub.asked("POST", "/commit/")


def test_dropped_upload_is_one_error_with_a_command_that_goes_on(sharded: Path, hub: HubServer) -> None:
    second = hashlib.sha256((sharded / "model-00002-of-00002.safetensors").read_bytes()).hexdigest()
    hub.faults[f"PUT /lfs/{second}"] = [DROP] * 6
    options = [sharded, "--repo", REPO, "--licence", "apache-2.0", "--language", "zh", "--base-model", "a/b"]
    done = port_release(*options)
    assert done.exit_code == 1 and "Traceback" not in done.output and "defect" not in done.output
    assert "Error while uploading 'model-00002-of-00002.safetensors' to the Hub:" in done.output
    assert "Files that arrived are not sent again" in done.output
    assert not hub.asked("POST", "/commit/") and (sharded / "README.md").is_file()
    line = next(line for line in done.output.splitlines() if line.strip().startswith("port-release /"))
    sent = len(hub.asked("PUT", "/lfs/"))
    again = port_release(*shlex.split(line)[1:])
    assert again.exit_code == 0, again.output
    assert hub.asked("PUT", "/lfs/")[sent:] == [f"/lfs/{second}"]
    assert len(hub.files[(REPO, "main")]) == len(release(sharded, ReleaseOptions(REPO, dry_run=True)).files)


@pytest.mark.parametrize(
    ("fault", "times", "message"),
    [
        ("POST /api/repos/create", [DROP], "Connection reset|disconnected|Broken pipe"),
        ("POST /api/repos/create", [(401, "who are you")], "401"),
        ("POST /api/repos/create", [(403, "not yours")], "403"),
        ("preupload", [(500, "sick")] * 6, "500"),
        ("objects/batch", [(503, "sick")] * 6, "503"),
        ("objects/batch", [DROP] * 6, "Connection reset|disconnected"),
        ("PUT /lfs/", [(502, "sick")] * 6, "502"),
        ("POST /api/models/somebody/ofa-tiny/commit", [DROP], "Connection reset|disconnected"),
        ("POST /api/models/somebody/ofa-tiny/commit", [(500, "sick")], "500"),
        ("validate-yaml", [(400, "bad yaml")], "metadata|400"),
    ],
)
def test_every_fault_of_the_hub_is_one_error(
    fault: str, times: list[object], message: str, model: Path, hub: HubServer
) -> None:
    hub.faults[fault] = list(times)
    with pytest.raises(OutputError, match=rf"did not take {REPO}: .*({message})") as found:
        release(model, ReleaseOptions(REPO))
    lines = str(found.value).splitlines()
    assert len(lines) == 3 and lines[2].strip() == f"port-release {model} --repo {REPO}"
    assert ("Log in" in lines[1]) == any(status in str(times) for status in ("401", "403"))
    assert not hub.files[(REPO, "main")]


@pytest.mark.parametrize(
    "request_", ["POST /api/repos/create", "preupload", "objects/batch", "PUT /lfs/", "validate-yaml", "/commit/"]
)
def test_after_an_answer_that_is_torn_the_same_command_completes_the_release(
    request_: str, model: Path, hub: HubServer
) -> None:
    hub.faults[request_] = [TEAR]
    first = port_release(model, "--repo", REPO)
    assert "Traceback" not in first.output and "defect" not in first.output, first.output
    if first.exit_code:
        line = next(line for line in first.output.splitlines() if line.strip().startswith("port-release /"))
        again = port_release(*shlex.split(line)[1:])
        assert again.exit_code == 0, again.output
    shown = release(model, ReleaseOptions(REPO, dry_run=True))
    assert {name: len(content) for name, content in hub.files[(REPO, "main")].items()} == {
        file.name: file.size for file in shown.files
    }
    assert len(set(hub.asked("PUT", "/lfs/"))) == 1


def test_passing_trouble_is_tried_again_without_a_word(model: Path, hub: HubServer) -> None:
    hub.faults = {"PUT /lfs/": [DROP, (503, "busy")], "preupload": [(500, "busy")]}
    assert release(model, ReleaseOptions(REPO)).url == f"{hub.url}/{REPO}"


@pytest.mark.parametrize("silent", ["POST /api/repos/create", f"GET /api/models/{REPO}", "preupload", "/commit/"])
def test_a_hub_that_falls_silent_is_one_error_and_no_endless_wait(
    silent: str, model: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("weightport.hub", "weightport.release.publishing"):
        monkeypatch.setattr(f"{place}.REQUEST_TIMEOUT", 0.2)
    hub.faults[silent] = [STALL] * 6
    with pytest.raises(OutputError, match=f"did not take {REPO}: .*timed out"):
        release(model, ReleaseOptions(REPO, private=True))
    assert not hub.files[(REPO, "main")]
    hub.faults.clear()
    assert release(model, ReleaseOptions(REPO, private=True)).url


def test_a_client_factory_of_the_user_s_is_kept_with_its_patience(model: Path, hub: HubServer) -> None:
    import huggingface_hub
    from huggingface_hub.utils import _http

    made = []

    def factory() -> object:
        client = _http.default_client_factory()
        client.timeout = 7.0
        made.append(client)
        return client

    huggingface_hub.set_client_factory(factory)
    try:
        release(model, ReleaseOptions(REPO))
        assert _http._GLOBAL_CLIENT_FACTORY is factory
    finally:
        huggingface_hub.set_client_factory(_http.default_client_factory)
    assert made and all(client.timeout.read == 7.0 for client in made)


def test_hub_that_is_not_there_leaves_the_directory_ready(model: Path, hub: HubServer) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(OutputError, match=r"Connection refused(.|\n)*is ready, with its card"):
        release(model, ReleaseOptions(REPO, private=True))
    assert (model / "README.md").is_file() and (model / "modeling_ofa.py").is_file()


def test_private_release_into_a_public_repository_is_refused(model: Path, hub: HubServer) -> None:
    hub.repositories[REPO] = {"private": False}
    with pytest.raises(OutputError, match="exists and is public"):
        release(model, ReleaseOptions(REPO, private=True))
    assert not hub.asked("PUT", "/lfs/") and not hub.asked("POST", "/commit/")


def test_command_to_go_on_has_every_option_quoted(tmp_path: Path) -> None:
    model = tmp_path / "my models" / "it's"
    model.mkdir(parents=True)
    options = ReleaseOptions(
        REPO, "other", "a/b", ("zh", "en"), private=True, revision="my branch", include=("two words.png",)
    )
    line = command(model, options)
    parsed = cli.port_release.make_context("port-release", shlex.split(line)[1:]).params
    assert parsed.pop("directory") == model and not parsed.pop("dry_run")
    assert {key: parsed[key] for key in ("repo", "licence", "base_model", "language", "private", "revision")} == {
        "repo": REPO, "licence": "other", "base_model": "a/b", "language": ("zh", "en"), "private": True,
        "revision": "my branch",
    }  # fmt: skip
    assert parsed["include"] == ("two words.png",)


ECHO = f"bad credentials: Bearer {TOKEN}"
SECRET_CASES: dict[str, tuple[str, list[object]]] = {
    "refused": ("POST /api/repos/create", [(401, ECHO)]),
    "repeated": ("PUT /lfs/", [DROP, (503, "busy")]),
    "upload fails": ("PUT /lfs/", [(503, ECHO)] * 6),
    "card refused": ("validate-yaml", [(500, ECHO)]),
    "commit fails": ("/commit/", [(500, ECHO)]),
    "released": ("nothing", []),
}


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("case", SECRET_CASES)
def test_no_token_is_ever_shown(
    case: str,
    debug: bool,
    model: Path,
    hub: HubServer,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With huggingface_hub's most talkative logs, and a server that sends the token back."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_debug()
    try:
        key, times = SECRET_CASES[case]
        hub.faults[key] = list(times)
        done = port_release(model, "--repo", REPO, *(["--debug"] if debug else []))
    finally:
        logging.set_verbosity(before)
    assert f"Bearer {TOKEN}" in hub.authorizations
    shown = "".join(traceback.format_exception(*done.exc_info)) if done.exc_info and debug else ""
    said = "".join([done.output, shown, *capfd.readouterr()])
    assert TOKEN not in said, said
    if case in ("repeated", "released"):
        assert done.exit_code == 0 and f"{hub.url}/{REPO}" in said, said
    else:
        assert done.exit_code == 1 and "did not take" in said and "port-release" in said


def test_a_process_of_its_own_takes_endpoint_and_token_from_the_environment_and_shows_no_secret(
    model: Path, hub: HubServer, tmp_path: Path
) -> None:
    hub.faults["/commit/"] = [(500, ECHO)]
    address = hub.url.replace("http://", "http://me:hidden@")
    environment = {
        **os.environ, "HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    code = "from weightport.cli import main; main()"
    arguments = [sys.executable, "-c", code, "release", str(model), "--repo", REPO, "--debug"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "did not take" in done.stderr
    assert TOKEN not in done.stdout + done.stderr and "hidden" not in done.stdout + done.stderr
