"""GKE and Slurm accept the files of deploy/, and docs/tpu.md describes them."""

import copy
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError

from tests import xla_flags
from trainer.commands.arguments import load_config, make_parser, override, parse_flags, resolve_arguments
from trainer.config import Sweep
from trainer.observe.log import read_rows
from trainer.sweep.cells import make_cells

ROOT = Path(__file__).parents[1]
JOBSET = yaml.safe_load((ROOT / "deploy" / "jobset.yaml").read_text())
SLURM, SLURM_SWEEP = ROOT / "deploy" / "slurm.sh", ROOT / "deploy" / "slurm_sweep.sh"
DOC = (ROOT / "docs" / "tpu.md").read_text()
POD = ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec")
CONTAINER = (*POD, "containers", 0)


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def differences(given: Any, read: Any, path: str = "") -> list[str]:
    """The paths in `given` that the schema does not know, and the required strings that are missing.

    The models of kubeflow-trainer-api drop an unknown field, and make a missing required string empty.
    """
    if isinstance(given, dict):
        lacking = [f"{path}/{key} lacks" for key in read.keys() - given.keys() if read[key] == ""]
        unknown = [f"{path}/{key} unknown" for key in given.keys() - read.keys()]
        return (
            lacking
            + unknown
            + [d for k in given.keys() & read.keys() for d in differences(given[k], read[k], f"{path}/{k}")]
        )
    if isinstance(given, list):
        return [d for i, (g, r) in enumerate(zip(given, read, strict=True)) for d in differences(g, r, f"{path}/{i}")]
    assert given == read, path
    return []


def check(manifest: Any) -> list[str]:
    """The unknown and the missing fields of a JobSet; raises `ValidationError` for a wrong type."""
    read = JobsetV1alpha2JobSet.from_dict(manifest)
    assert read is not None
    return differences(manifest, read.to_dict())


def test_manifest_is_a_jobset():
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert check(JOBSET) == []


@pytest.mark.parametrize(
    "path",
    [("spec", "replicas"), ("spec", "network", "subDomain"), (*POD, "nodeSelectors"), (*CONTAINER, "arguments")],
    ids=lambda path: str(path[-1]),
)
def test_a_field_that_jobset_or_kubernetes_does_not_know_is_found(path):
    manifest = copy.deepcopy(JOBSET)
    at(manifest, path[:-1])[path[-1]] = {"a": "b"}
    assert check(manifest) == ["/" + "/".join(map(str, path)) + " unknown"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicatedJobs", 0, "replicas"), "1"),
        (("spec", "failurePolicy", "maxRestarts"), True),
        (("spec", "replicatedJobs", 0, "template", "spec", "parallelism"), 4.5),
        ((*POD, "nodeSelector", "cloud.google.com/gke-tpu-topology"), 44),
        ((*CONTAINER, "args"), "--config=a.py"),
        ((*CONTAINER, "resources", "limits", "google.com/tpu"), [4]),
        ((*CONTAINER, "ports", 0, "containerPort"), "8471"),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else "",
)
def test_a_value_of_the_wrong_type_is_refused(path, value):
    manifest = copy.deepcopy(JOBSET)
    at(manifest, path[:-1])[path[-1]] = value
    with pytest.raises((ValidationError, ValueError)):
        check(manifest)


@pytest.mark.parametrize(
    "path", [("spec", "replicatedJobs", 0, "name"), (*CONTAINER, "name")], ids=["job", "container"]
)
def test_a_name_that_is_missing_is_found(path):
    manifest = copy.deepcopy(JOBSET)
    del at(manifest, path[:-1])[path[-1]]
    assert check(manifest) == ["/" + "/".join(map(str, path)) + " lacks"]


@pytest.mark.parametrize("path", [POD[:-1], (*POD, "containers")], ids=["pod", "containers"])
def test_a_part_that_is_missing_is_refused(path):
    manifest = copy.deepcopy(JOBSET)
    del at(manifest, path[:-1])[path[-1]]
    with pytest.raises(ValidationError):
        check(manifest)


def test_manifest_asks_for_all_chips_of_its_topology_and_one_pod_a_host():
    job, pod = at(JOBSET, POD[:-2]), at(JOBSET, POD)
    chips = math.prod(int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert (
        job["parallelism"]
        == job["completions"]
        == chips // pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    )
    assert job["completionMode"] == "Indexed"  # or GKE numbers no hosts
    assert pod["restartPolicy"] == "Never"  # or Kubernetes refuses the failure policy


def test_manifest_mounts_what_it_declares_and_its_policy_names_its_container():
    job, pod = at(JOBSET, POD[:-2]), at(JOBSET, POD)
    (container,) = pod["containers"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_table_of_slices_multiplies_out_and_has_the_row_of_the_manifest():
    rows = re.findall(r"^\| (\w+):([\dx]+) \| `([\w-]+)` \| `([\dx]+)` \| (\d+) \| (\d+) \|$", DOC, re.MULTILINE)
    assert len(rows) == 5
    for _, topology, _, again, hosts, chips in rows:
        assert topology == again
        assert math.prod(map(int, topology.split("x"))) == int(hosts) * int(chips)
    selector, job = at(JOBSET, POD)["nodeSelector"], at(JOBSET, POD[:-2])
    mine = (selector["cloud.google.com/gke-tpu-accelerator"], selector["cloud.google.com/gke-tpu-topology"])
    assert (*mine, str(job["parallelism"])) in {(row[2], row[3], row[4]) for row in rows}


def commands() -> list[list[str]]:
    """The trainer's command lines with a config that docs/tpu.md and deploy/ show, without `python -m trainer`."""
    container = at(JOBSET, CONTAINER)
    lines = re.findall(r"python3? -m trainer (\w+(?:\s+\\?\s*--[\w.]+=[^\s…\x22]+)+)", DOC)
    lines += [f"train {text}" for text in re.findall(r"deploy/slurm\.sh (--config=.*)", DOC + SLURM.read_text())]
    split = [[word for word in line.split() if word != "\\"] for line in lines]
    split.append([container["command"][-1], *container["args"]])
    return [words for words in split if any(word.startswith("--config=configs/") for word in words)]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_that_are_shown_are_understood(command, monkeypatch):
    monkeypatch.setattr("trainer.workdir._can_open_gs", lambda: True)  # nothing is opened here
    monkeypatch.chdir(ROOT)
    name, *arguments = command
    module = importlib.import_module(f"trainer.commands.{name}")
    parser = make_parser(name, module.DESCRIPTION)
    module.add_options(parser)
    assert resolve_arguments(*parse_flags(parser, arguments)).run.total_steps > 0


def test_commands_are_found_in_all_three_places():
    shown = ["prepare", "plan", "train", "train"]
    assert [command[0] for command in commands()] == [*shown, "train", "train"]


@pytest.mark.parametrize("script", [SLURM, SLURM_SWEEP], ids=lambda path: path.stem)
def test_slurm_script_is_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


# Slurm's programs, as far as the script uses them: `srun` gives each task the variables of a Slurm step.
SRUN = """#!/usr/bin/env bash
[ "$1" = --wait=120 ] && shift
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=${TASKS:-2}
code=0
for SLURM_PROCID in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_LOCALID=$SLURM_PROCID SLURM_PROCID=$SLURM_PROCID "$@" > "$OUT/$SLURM_PROCID.log" 2>&1 & tasks[SLURM_PROCID]=$!
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" > "$OUT/scontrol.log"\n'


def run_script(
    folder: Path, *arguments: str, script: Path = SLURM, **variables: str
) -> subprocess.CompletedProcess[str]:
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OUT": str(folder),
        "SLURM_JOB_ID": str(os.getpid()),  # JAX chooses the port by it
        **variables,
    }
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(("code", "queued"), [(143, True), (2, False), (0, False)])
def test_slurm_script_queues_the_job_again_only_after_a_saved_sigterm(tmp_path, code, queued):
    folder = tmp_path / "python"
    folder.mkdir()
    (folder / "python").write_text(f'#!/usr/bin/env bash\necho "$@"\nexit {code}\n')
    (folder / "python").chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "programs"), str(folder), os.environ["PATH"]])
    result = run_script(tmp_path, "--config=a.py", "--workdir=a folder", PATH=path)
    assert result.returncode == code
    assert (tmp_path / "0.log").read_text() == "-m trainer train --config=a.py --workdir=a folder\n"
    assert (tmp_path / "scontrol.log").exists() == queued
    if queued:
        assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"


def array_command() -> list[str]:
    """The arguments in the comment of the array's script."""
    (line,) = re.findall(r"^#   sbatch --array=0-5 deploy/slurm_sweep\.sh (.*)$", SLURM_SWEEP.read_text(), re.MULTILINE)
    return line.split()


def test_command_of_the_array_has_a_cell_for_each_job(monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = importlib.import_module("trainer.commands.sweep")
    parser = make_parser("sweep", sweep.DESCRIPTION)
    sweep.add_options(parser)
    options, overrides = parse_flags(parser, ["--cell=5", *array_command()])
    run = load_config(options.config)
    cells, _ = make_cells(run, Sweep(grid=dict(text.split("=", 1) for text in options.grid)), override)
    assert (len(cells), options.cell, overrides) == (6, 5, [])


@pytest.mark.parametrize(("code", "queued"), [(143, True), (1, False)])
def test_job_of_an_array_trains_its_cell_and_is_queued_again_after_a_saved_sigterm(tmp_path, code, queued):
    folder = tmp_path / "python"
    folder.mkdir()
    (folder / "python").write_text(f'#!/usr/bin/env bash\necho "$@"\nexit {code}\n')
    (folder / "python").chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "programs"), str(folder), os.environ["PATH"]])
    variables = {"PATH": path, "TASKS": "1", "SLURM_ARRAY_TASK_ID": "3"}
    result = run_script(tmp_path, "--config=a.py", "--workdir=a folder", script=SLURM_SWEEP, **variables)
    assert result.returncode == code
    assert (tmp_path / "0.log").read_text() == "-m trainer sweep --cell=3 --config=a.py --workdir=a folder\n"
    assert (tmp_path / "scontrol.log").exists() == queued


@pytest.mark.slow
def test_jobs_of_an_array_train_a_cell_each_and_the_last_one_sees_all(tmp_path):
    (tmp_path / "config.py").write_text(
        "from tests.tasks import make_run\n\ndef get_config():\n    return make_run(3)\n"
    )
    given = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'out'}", "--grid=seed=0,1"]
    variables = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=2), "TASKS": "1"}
    for index in ("0", "1"):
        result = run_script(tmp_path, *given, script=SLURM_SWEEP, SLURM_ARRAY_TASK_ID=index, **variables)
        log = (tmp_path / "0.log").read_text()
        assert result.returncode == 0, log
        assert f"seed={index}: at step 3 after" in log
        assert ("1 done, 1 open" if index == "0" else "2 done") in log


@pytest.mark.slow
def test_processes_that_slurm_starts_find_each_other_and_train_one_run(tmp_path):
    (tmp_path / "config.py").write_text(
        "from tests.tasks import make_run\n\ndef get_config():\n    return make_run(3)\n"
    )
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=2)}
    workdir = tmp_path / "run"
    result = run_script(
        tmp_path, f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}", PYTHONPATH=str(ROOT), **devices
    )
    logs = [(tmp_path / f"{task}.log").read_text() for task in (0, 1)]
    assert result.returncode == 0, logs
    assert sum("done:" in log for log in logs) == 1  # two processes, one run
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [1, 2, 3]
