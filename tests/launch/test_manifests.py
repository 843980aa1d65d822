"""The launch files against the schemas of the programs that read them, and the commands in them."""

import copy
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import parse_args

from train.config_file import load_config

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "configs" / "launch"
SKYPILOT = ROOT / ".venv" / "skypilot" / "bin" / "python"  # .ci/run installs it there

READ_SKYPILOT = """
import json, sys
import sky
for task in json.load(sys.stdin):
    try:
        sky.Task.from_yaml_config(task, env_overrides=[("NFS", "nfs:/")])
        print("fine")
    except ValueError as error:
        print(" ".join(str(error).split()))
"""


def read_kubernetes():
    documents = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


def skypilot():
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def misspelt(value, *path):
    """A copy in which the last key of a path has one letter more."""
    changed = copy.deepcopy(value)
    *way, last = path
    inner = changed
    for key in way:
        inner = inner[key]
    inner[f"{last}s"] = inner.pop(last)
    return changed


def fits_kubernetes(document):
    """Whether a document is as Kubeflow's published models have it, with no key that they do not."""
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed"
    )
    kinds = {
        "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    # They leave out what they do not know.
    return kinds[document["kind"]].from_dict(document).to_dict() == document


POD = ("spec", "template", "spec", "replicatedJobs", 0, "template", "spec")


def test_kubernetes_schema():
    documents = read_kubernetes()
    assert documents.keys() == {"PersistentVolumeClaim", "TrainingRuntime", "TrainJob"}
    for document in documents.values():
        assert fits_kubernetes(document), document["kind"]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("TrainJob", ("spec", "trainer", "numNodes")),
        ("TrainingRuntime", ("spec", "template", "spec", "failurePolicy", "maxRestarts")),
        ("TrainingRuntime", (*POD, "podFailurePolicy")),
        ("TrainingRuntime", (*POD, "template", "spec", "terminationGracePeriodSeconds")),
    ],
)
def test_kubernetes_schema_knows_no_other_keys(kind, path):
    assert not fits_kubernetes(misspelt(read_kubernetes()[kind], *path))


def test_kubernetes_parts_name_each_other():
    documents = read_kubernetes()
    runtime, job = documents["TrainingRuntime"], documents["TrainJob"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    claim = volumes["zoetrope"]["persistentVolumeClaim"]["claimName"]
    assert claim == documents["PersistentVolumeClaim"]["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    for argument in job["spec"]["trainer"]["args"]:
        if "=/" in argument:
            assert argument.split("=")[1].startswith(mounts["zoetrope"])


def test_kubernetes_restarts():
    """The messages are those of Kubernetes' job controller (pod_failure_policy.go)."""
    job_set = read_kubernetes()["TrainingRuntime"]["spec"]["template"]["spec"]
    rules = job_set["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    codes = {code for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}

    def action(message):
        for rule in job_set["failurePolicy"]["rules"]:
            if any(re.search(each, message) for each in rule["onJobFailureMessagePatterns"]):
                return rule["action"]
        return None

    said = (
        "Container node for pod ns/node-0 failed with exit code {} matching FailJob rule at index 1"
    )
    assert codes == {75, 2}
    assert action(said.format(75)) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(said.format(2)) == "FailJobSet"
    assert action(said.format(137)) is None  # as any other failure: one of maxRestarts
    lost = "Pod ns/node-0 has condition DisruptionTarget matching FailJob rule at index 0"
    assert action(lost) == "RestartJobSetAndIgnoreMaxRestarts"


@pytest.mark.skipif(not SKYPILOT.exists(), reason=f"no SkyPilot in {SKYPILOT}; see .ci/run")
def test_skypilot_schema(tmp_path):
    task = skypilot()
    recovery = ("resources", "job_recovery", "recover_on_exit_codes")
    wrong = [
        misspelt(task, "num_nodes"),
        misspelt(task, "resources", "use_spot"),
        {**task, "resources": {**task["resources"], "job_recovery": {recovery[-1]: ["75"]}}},
    ]
    result = subprocess.run(
        [SKYPILOT, "-c", READ_SKYPILOT],
        input=json.dumps([task, *wrong]),
        env={**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
    )
    answers = result.stdout.splitlines()
    assert answers[0] == "fine", result.stdout + result.stderr
    assert len(answers) == 4
    for answer, name in zip(answers[1:], ("num_nodess", "use_spots", recovery[-1])):
        assert answer != "fine"
        assert name in answer
    # SkyPilot lets other keys of job_recovery pass, for its plugins.
    known = {"strategy", "recover_on_exit_codes", "max_restarts_on_errors"}
    assert task["resources"]["job_recovery"].keys() <= known


def arguments_of_slurm(monkeypatch):
    text = (LAUNCH / "slurm.sh").read_text().replace("\\\n", "")
    default = shlex.split(re.search(r"set -- (.*) #", text)[1])
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    command = shlex.split(re.search(r'exec "\$PYTHON" (-m train.launch .*)', text)[1])
    replaced = {"$SLURM_NNODES": options["nodes"], "$processes": options["gpus-per-node"]}
    for before, after in replaced.items():
        command = [part.replace(before, after) for part in command]
    return [*command[:-1], *default]


def arguments_of_kubernetes(monkeypatch):
    trainer = read_kubernetes()["TrainJob"]["spec"]["trainer"]
    monkeypatch.setenv("PET_NNODES", str(trainer["numNodes"]))
    monkeypatch.setenv("PET_NPROC_PER_NODE", str(trainer["numProcPerNode"]))
    assert trainer["command"][0] == "python"
    return [*trainer["command"][1:], *trainer["args"]]


def arguments_of_skypilot(monkeypatch):
    task = skypilot()
    nodes, gpus = task["num_nodes"], task["resources"]["accelerators"].split(":")[1]
    show = task["run"].replace("exec .venv/bin/python", "printf '%s\\n'").replace("ip -4", "true")
    variables = {
        "SKYPILOT_NUM_NODES": nodes,
        "SKYPILOT_NODE_RANK": 1,
        "SKYPILOT_NUM_GPUS_PER_NODE": gpus,
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    result = subprocess.run(
        ["bash", "-c", show], env=environment, capture_output=True, text=True, check=True
    )
    arguments = result.stdout.splitlines()
    assert "--master-addr=10.0.0.1" in arguments
    assert "--node-rank=1" in arguments
    return arguments


@pytest.mark.parametrize(
    "find", [arguments_of_slurm, arguments_of_kubernetes, arguments_of_skypilot]
)
def test_command_trains_a_config_that_fits(find, monkeypatch):
    """torchrun's own parser reads it, and the batch divides among two nodes of eight GPUs."""
    module, name, *rest = find(monkeypatch)
    assert (module, name) == ("-m", "train.launch")
    arguments = parse_args(rest)
    assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
    assert arguments.module
    assert arguments.training_script == "train"
    config, *overrides = arguments.training_script_args
    assert config == "configs/presets/1.3b.yaml"
    train = load_config(ROOT / config, overrides).train
    assert train.batch_size % (16 * train.grad_accum) == 0


def commands_of_the_docs():
    """Each line with torchrun, as it stands in a block of code, without what continues it."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in re.findall(r"^    (?:\.venv/bin/)?torchrun (.*)$", page.read_text(), re.M):
            if not line.endswith("\\"):
                yield pytest.param(line, id=f"{page.name}-{line[:60]}")


@pytest.mark.parametrize("line", list(commands_of_the_docs()))
def test_torchrun_takes_the_commands_of_the_docs(line):
    """And leaves the options of ours alone, which it reads first."""
    arguments = parse_args(shlex.split(line))
    ours = [arguments.training_script, *arguments.training_script_args]
    assert shlex.split(line)[-len(ours) :] == ours
    assert ours[0] in ("train", ".venv/bin/zoetrope")


def test_skypilot_scripts_parse():
    task = skypilot()
    for name in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[name], text=True, check=True)
