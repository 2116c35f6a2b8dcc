"""The run directory: when a stage may write to it, and what run.json records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config.schema import SFTConfig
from rlhf.errors import CheckpointError, ConfigError
from rlhf.runs.run_dir import RUN_FILE, RunDir, fingerprint_path, read_json, write_json


def config(folder: Path, **values: object) -> SFTConfig:
    """Return an SFT configuration whose output_dir is `folder`."""
    plain = {"output_dir": str(folder), "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}
    return SFTConfig.model_validate(plain | values)


def info(folder: Path) -> dict:
    """Return the content of run.json."""
    return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))


def interrupted_run(folder: Path, inputs: dict[str, str] | None = None) -> RunDir:
    """Start a run in `folder` and release its lock, as if its process had died."""
    run = RunDir(folder)
    run.info = info(folder) if (folder / RUN_FILE).is_file() else {}
    run.start("sft", config(folder), seed=1, processes=1, versions={}, inputs=inputs or {})
    run.lock.release()
    return run


def test_a_missing_or_empty_folder_is_new_and_checking_writes_nothing(tmp_path: Path) -> None:
    assert RunDir(tmp_path / "run").check("sft", config(tmp_path / "run"), {}) == "new"
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    assert RunDir(tmp_path / "empty").check("sft", config(tmp_path / "empty"), {}) == "new"


def test_a_run_whose_process_died_is_interrupted_and_a_finished_one_finished(tmp_path: Path) -> None:
    run = interrupted_run(tmp_path, {"d": "1"})
    assert RunDir(tmp_path).check("sft", config(tmp_path), {"d": "1"}) == "interrupted"
    run.finish()
    assert RunDir(tmp_path).check("sft", config(tmp_path), {"d": "1"}) == "finished"
    assert info(tmp_path)["peak_memory_gib"] > 0


@pytest.mark.parametrize(
    "left", [(".lock",), (".lock", "config.yaml.new.tmp"), (".lock", "run.json.tmp", "config.yaml.new")]
)
def test_a_folder_left_before_run_json_was_written_counts_as_new(left: tuple[str, ...], tmp_path: Path) -> None:
    """The run was killed before it wrote run.json."""
    for name in left:
        (tmp_path / name).write_text("", encoding="utf-8")
    run = RunDir(tmp_path)
    assert run.check("sft", config(tmp_path), {}) == "new"
    run.start("sft", config(tmp_path), seed=1, processes=1, versions={}, inputs={})
    run.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "run.json"]


def test_a_run_killed_between_run_json_and_config_yaml_continues(tmp_path: Path) -> None:
    interrupted_run(tmp_path)
    (tmp_path / "config.yaml").rename(tmp_path / "config.yaml.new")
    run = RunDir(tmp_path)
    assert run.check("sft", config(tmp_path), {}) == "interrupted"
    run.start("sft", config(tmp_path), seed=1, processes=1, versions={}, inputs={})
    run.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "run.json"]


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`os.access` is replaced: root may write anywhere except on a read-only disk, which tests/faults covers."""
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(
        ConfigError, match=r"cannot be written to .*read-only for this process\); change its permissions"
    ):
        RunDir(tmp_path / "a" / "run").check("sft", config(tmp_path), {})
    RunDir(tmp_path / "a" / "run", main=False).check("sft", config(tmp_path), {})
    assert list(tmp_path.iterdir()) == []


def test_attempts_are_counted(tmp_path: Path) -> None:
    interrupted_run(tmp_path)
    again = RunDir(tmp_path)
    again.check("sft", config(tmp_path), {})
    again.start("sft", config(tmp_path), seed=1, processes=1, versions={}, inputs={})
    assert info(tmp_path)["attempts"] == 2


def test_a_run_whose_configuration_has_an_old_key_continues(tmp_path: Path) -> None:
    interrupted_run(tmp_path)
    saved = tmp_path / "config.yaml"
    text = saved.read_text(encoding="utf-8")
    saved.write_text(text.replace("grace_seconds: ", "grace: "), encoding="utf-8")
    assert saved.read_text(encoding="utf-8") != text
    assert RunDir(tmp_path).check("sft", config(tmp_path), {}) == "interrupted"


@pytest.mark.parametrize(("stage", "seed"), [("reward", 1), ("sft", 2)])
def test_another_run_is_refused(tmp_path: Path, stage: str, seed: int) -> None:
    interrupted_run(tmp_path).finish()
    before = info(tmp_path)
    with pytest.raises(ConfigError, match=r"already holds another run \(found: sft, finished\); choose another"):
        RunDir(tmp_path).check(stage, config(tmp_path, seed=seed), {})
    assert info(tmp_path) == before


def test_a_folder_with_other_files_is_refused_and_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"files that do not belong to a run \(found: thesis\.tex\); choose another output_dir"
    ):
        RunDir(tmp_path).check("sft", config(tmp_path), {})


def test_an_output_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="the output folder is a file"):
        RunDir(tmp_path / "run").check("sft", config(tmp_path / "run"), {})


def test_inputs_that_changed_are_refused_by_name(tmp_path: Path) -> None:
    interrupted_run(tmp_path, {"a": "1", "b": "1"}).finish()
    with pytest.raises(ConfigError, match=r"inputs that have changed since \(found: b\)"):
        RunDir(tmp_path).check("sft", config(tmp_path), {"a": "1", "b": "2"})
    assert (
        RunDir(tmp_path).check("sft", config(tmp_path), {"a": "1"}) == "finished"
    )  # an input that no longer exists is not compared


def test_damaged_run_json_is_named(tmp_path: Path) -> None:
    interrupted_run(tmp_path)
    (tmp_path / RUN_FILE).write_text('{"stage": "sf', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"run\.json: damaged JSON"):
        RunDir(tmp_path).check("sft", config(tmp_path), {})


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError("no"), "failed"), (SystemExit(3), "failed")]
)
def test_a_guard_records_how_it_ended_and_lets_the_error_through(
    tmp_path: Path, error: BaseException, status: str
) -> None:
    run = interrupted_run(tmp_path)
    with pytest.raises(type(error)), run.guard():
        raise error
    saved = info(tmp_path)
    assert saved["status"] == status
    assert saved.get("error") == (f"{type(error).__name__}: {error}" if status == "failed" else None)
    assert saved["timings_s"]["total"] >= 0
    assert RunDir(tmp_path).check("sft", config(tmp_path), {}) == "interrupted"


def test_without_an_error_the_run_keeps_running_until_finish(tmp_path: Path) -> None:
    run = interrupted_run(tmp_path)
    with run.guard():
        pass
    assert info(tmp_path)["status"] == "running"


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", main=False)
    run.start("sft", config(tmp_path / "run"), seed=1, processes=2, versions={}, inputs={})
    run.note(x=1)
    assert not (tmp_path / "run").exists()


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": "ä"})
    assert read_json(path) == {"a": "ä"}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def crash(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="power cut"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": "ä"}


def test_a_model_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    run = interrupted_run(tmp_path)

    def crash() -> None:
        with run.new_model() as folder:
            (folder / "weights").write_text("2", encoding="utf-8")
            raise RuntimeError

    with run.new_model() as folder:
        (folder / "weights").write_text("1", encoding="utf-8")
        assert not run.model.exists()
    with pytest.raises(RuntimeError):
        crash()
    assert (run.model / "weights").read_text(encoding="utf-8") == "1"
    with run.new_model() as folder:  # what the crash left does not leak into the next attempt
        assert list(folder.iterdir()) == []


def test_a_fingerprint_changes_with_content_and_with_the_run_behind_a_model(tmp_path: Path) -> None:
    file, folder = tmp_path / "f", tmp_path / "run" / "model"
    fingerprints = []
    for text in ("a", "b"):
        file.write_text(text, encoding="utf-8")
        fingerprints.append(fingerprint_path(file))
    folder.mkdir(parents=True)
    (folder / "w").write_text("1", encoding="utf-8")
    fingerprints.append(fingerprint_path(folder))
    for _ in range(2):
        interrupted_run(folder.parent)
        fingerprints.append(fingerprint_path(folder))
        assert fingerprint_path(folder) == fingerprint_path(folder.parent) == fingerprints[-1]
    assert len(set(fingerprints)) == 5


def test_a_run_resumes_with_other_memory_settings_and_lists_them(tmp_path: Path) -> None:
    interrupted_run(tmp_path)
    smaller = config(tmp_path, optim={"microbatch_size": 2, "activation_checkpointing": True})
    run = RunDir(tmp_path)
    assert run.check("sft", smaller, {}) == "interrupted"
    assert "microbatch_size: 16" in (tmp_path / "config.yaml").read_text(encoding="utf-8"), "checking writes nothing"
    run.start("sft", smaller, seed=1, processes=1, versions={}, inputs={})
    changes = {"optim.microbatch_size": [16, 2], "optim.activation_checkpointing": [False, True]}
    assert info(tmp_path)["changed"] == [{"attempt": 2, **changes}]
    assert "microbatch_size: 2" in (tmp_path / "config.yaml").read_text(encoding="utf-8")
    run.finish()
    assert RunDir(tmp_path).check("sft", config(tmp_path), {}) == "finished"


def test_a_setting_that_changes_results_is_refused_beside_one_that_does_not(tmp_path: Path) -> None:
    interrupted_run(tmp_path)
    with pytest.raises(ConfigError, match="already holds another run"):
        RunDir(tmp_path).check("sft", config(tmp_path, optim={"microbatch_size": 2, "batch_size": 32}), {})
