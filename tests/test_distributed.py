"""distributed: the same blocks a step and the same model for any number of processes; one of them writes."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import distributed
import tiny
import train_loop
from conftest import ROOT, Runner, copy_project, kill_at
from train_model import Params

CONFIGS = sorted((ROOT / "docs/accelerate").glob("*.yaml"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "WORLD_SIZE",
        "RANK",
        "NUM_PROCESSES",
        "ACCELERATE_CONFIG_FILE",
        "ACCELERATE_USE_FSDP",
        distributed.WORKER,
    ):
        monkeypatch.delenv(name, raising=False)


@given(rows=st.integers(1, 5), world=st.integers(1, 4), times=st.integers(1, 4), steps=st.integers(1, 3))
def test_a_step_has_the_same_blocks_for_any_number_of_processes(rows: int, world: int, times: int, steps: int) -> None:
    """The batches of the stream go to the processes in turn, as accelerate's BatchSamplerShard deals them."""
    size = rows * world * times
    batches = [list(range(first, first + rows)) for first in range(0, steps * size, rows)]
    count = distributed.accumulation(size, rows, world)
    for step in range(steps):
        fed = [
            batches[world * batch + rank] for rank in range(world) for batch in range(step * count, (step + 1) * count)
        ]
        assert sorted(block for batch in fed for block in batch) == list(range(step * size, (step + 1) * size))


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"global_batch_size 8 is no multiple of .* 4 x 4 processes"):
        distributed.accumulation(8, 4, 4)


def test_who_starts_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not distributed.wanted() and distributed.first() and distributed.processes() == 1
    monkeypatch.setenv("NUM_PROCESSES", "2")
    assert distributed.wanted()
    assert distributed.command("x.py", "chat")[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "x.py", "chat"
    ]  # fmt: skip
    monkeypatch.setenv(distributed.WORKER, '{"work": "x"}')
    monkeypatch.setenv("RANK", "1")
    assert not distributed.wanted() and not distributed.first() and distributed.worker() == {"work": "x"}
    monkeypatch.delenv(distributed.WORKER)
    monkeypatch.setenv("NUM_PROCESSES", "two")
    with pytest.raises(SystemExit, match="NUM_PROCESSES is 'two'"):
        distributed.processes()


def test_a_config_file_goes_to_accelerate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(tmp_path / "no.yaml"))
    with pytest.raises(SystemExit, match="which is no file"):
        distributed.command("x.py")
    with pytest.raises(SystemExit, match="which is no file"):
        distributed.wanted()
    (tmp_path / "no.yaml").write_text("")
    assert distributed.command("x.py")[2:4] == ["accelerate.commands.launch", "--config_file"]
    # Two trainings on one machine must not meet at accelerate's usual port.
    assert distributed.command("x.py")[5:7] == ["--main_process_port", "0"]
    (tmp_path / "no.yaml").write_text("main_process_port: 29511")
    assert "--main_process_port" not in distributed.command("x.py")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("num_processes: [", "is no YAML"),
        ("- num_processes", "holds no keys of accelerate's"),
        ("num_processes: 0", "num_processes of ACCELERATE_CONFIG_FILE is '0': set it to a whole number"),
    ],
)
def test_a_config_file_that_says_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "a.yaml").write_text(content)
    monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(tmp_path / "a.yaml"))
    with pytest.raises(SystemExit, match=said):
        distributed.processes()


def test_a_worker_counts_itself_alone_without_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate may start one process where NUM_PROCESSES says more; a step would have had a part of its blocks."""
    monkeypatch.setenv("NUM_PROCESSES", "2")
    monkeypatch.setenv(distributed.WORKER, "{}")
    assert distributed.processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert distributed.processes() == 3


@pytest.mark.parametrize(
    ("kind", "started"),
    [("NO", 1), ("MULTI_CPU", 1), pytest.param("MULTI_GPU", 2, marks=pytest.mark.slow)],
)
def test_how_many_processes_accelerate_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, started: int
) -> None:
    """The number of the config is what is counted with; where accelerate would start one of several, we refuse."""
    (tmp_path / "a.yaml").write_text(
        f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind}\nuse_cpu: true\nnum_machines: 1\n"
        "num_processes: 2\nmain_process_port: 0\n"
    )
    monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(tmp_path / "a.yaml"))
    assert distributed.processes() == 2 and distributed.wanted()
    (tmp_path / "x.py").write_text("import os, sys, pathlib; pathlib.Path(sys.argv[1], f'{os.getpid()}.ran').touch()\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "a.yaml")]
    if started == 2:
        command = distributed.command(str(tmp_path / "x.py"), str(tmp_path))
    else:
        with pytest.raises(SystemExit, match=f"distributed_type {kind}, of which accelerate starts one process"):
            distributed.command("x.py")
        command += [str(tmp_path / "x.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert len(list(tmp_path.glob("*.ran"))) == started
    monkeypatch.setenv("NUM_PROCESSES", "1")
    assert distributed.command("x.py")[-3:] == ["--num_processes", "1", "x.py"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo on a CPU")
def test_a_wrong_number_of_processes_is_one_sentence_before_any_starts(tmp_path: Path, run_stage: Runner) -> None:
    project = make(tmp_path / "project", per_device_train_batch_size=4, global_batch_size=8)
    for environment in (
        {"NUM_PROCESSES": "3"},
        {"ACCELERATE_CONFIG_FILE": str(ROOT / "docs/accelerate/gpus.yaml")},
    ):
        done = run_stage(project, "train_model", "pretrain", **environment)
        number = environment.get("NUM_PROCESSES", "4")
        assert done.returncode == 1
        assert done.stderr == (
            f"global_batch_size 8 is no multiple of per_device_train_batch_size 4 x {number} processes; "
            "start another number of them.\n"
        )


def test_a_worker_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed, "command", lambda *_: ["false"])
    with pytest.raises(SystemExit, match="train_model@chat: a worker failed"):
        distributed.train("train_model@chat", tmp_path, {}, "x.py", "chat")


def test_there_is_an_example_for_each_launch() -> None:
    assert [path.stem for path in CONFIGS] == ["deepspeed_zero2", "deepspeed_zero3", "fsdp", "gpus"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_the_examples(path: Path) -> None:
    """Of the installed version, which would pass over an unknown fsdp key without a word."""
    config = ClusterConfig.from_yaml_file(path)  # refuses unknown keys of the first level
    known = {action.dest for action in launch_command_parser()._actions}
    assert {f"fsdp_{key.removeprefix('fsdp_')}" for key in config.fsdp_config} <= known
    assert set(config.deepspeed_config) <= known
    content = yaml.safe_load(path.read_text())
    assert content["mixed_precision"] == "no", "train_model's bf16 says it"
    assert "gradient_accumulation_steps" not in str(content), "train_model's global_batch_size says it"


SETTINGS = {**tiny.TRAIN, "learning_rate": 1e-3, "per_device_train_batch_size": 1, "save_steps": 2, "max_steps": 6}
LORA = {**tiny.LORA, "lora_dropout": 0.0}


def make(folder: Path, **changes: object) -> Path:
    copy_project(folder)
    # Wide, as ZeRO 3 leaves tensors below 100,000 numbers whole.
    tiny.base(folder / "models/configs/tiny", hidden_size=384)
    tiny.phase(folder, "pretrain", masked=True)
    tiny.params_yaml(folder, pretrain={"base": "models/configs/tiny", "train_model": {**SETTINGS, **changes}})
    return folder


def curve(folder: Path) -> list[list[float]]:
    with (folder / "plots/pretrain/train.csv").open() as file:
        return [[float(row["loss"]), float(row["grad_norm"])] for row in csv.DictReader(file)]


def trained(folder: Path) -> Path:
    return folder / "models/pretrain/trained"


FSDP_ON_A_CPU = """
import os
if "TERROIR_WORKER" in os.environ:
    from accelerate import state, utils

    original = state.AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **options):
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        self.fsdp_plugin = fsdp_plugin or self.fsdp_plugin
        if self._mixed_precision != "no":
            self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.distributed_type = utils.DistributedType.FSDP
        open(os.environ["SEEN"], "a").write("fsdp ")

    state.AcceleratorState.__init__ = init
"""


HOW_A_WORKER_ENDS = """
import atexit, os
if "RANK" in os.environ:
    atexit.register(lambda: open(os.environ["ENDED"], "a"))
"""


def fsdp_over_gloo(site: Path) -> dict[str, str]:
    """Return the environment for two processes that share weights by FSDP 2, with the keys of docs/accelerate.

    accelerate 1.15 takes FSDP for accelerators alone; a module that each worker imports first says otherwise.
    """
    with (site / "sitecustomize.py").open("a") as file:
        file.write(FSDP_ON_A_CPU)
    keys = yaml.safe_load((ROOT / "docs/accelerate/fsdp.yaml").read_text())["fsdp_config"]
    environment = {key.upper(): str(value) for key, value in keys.items()}
    return {**environment, "SEEN": str(site / "seen"), "ACCELERATE_USE_FSDP": "true", "NUM_PROCESSES": "2"}


DEEPSPEED = ROOT / ".work/deepspeed"  # where .ci/run installs it


def deepspeed_over_gloo(stage: str) -> dict[str, str]:
    """Return the environment for two processes of DeepSpeed, as a user would start them: it takes a CPU as it is."""
    return {
        "ACCELERATE_CONFIG_FILE": str(ROOT / f"docs/accelerate/deepspeed_{stage}.yaml"),
        "NUM_PROCESSES": "2",
        "PYTHONWARNINGS": "ignore::FutureWarning",  # hundreds of lines, before what a failed worker says
        # It compiles an operation when it first starts on a CPU: with this ninja, into this folder.
        "PATH": os.pathsep.join([str(DEEPSPEED / "bin"), os.environ["PATH"]]),
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".work/torch_extensions"),
    }


def launch(how: str, site: Path) -> dict[str, str]:
    """Return the environment of two processes; each makes `site`/ended where its interpreter comes to its end."""
    site.mkdir()
    (site / "sitecustomize.py").write_text(HOW_A_WORKER_ENDS)
    environment, places = {"NUM_PROCESSES": "2"}, [str(site), os.environ.get("PYTHONPATH", "")]
    if how == "fsdp":
        environment = fsdp_over_gloo(site)
    elif how.startswith("zero"):
        environment, places = deepspeed_over_gloo(how), [str(DEEPSPEED), *places]
    return {**environment, "PYTHONPATH": os.pathsep.join(places), "ENDED": str(site / "ended")}


WAYS = {
    "ddp": [],
    "fsdp": [pytest.mark.slow],
    "zero2": [
        pytest.mark.slow,
        pytest.mark.skipif(
            not DEEPSPEED.is_dir() and importlib.util.find_spec("deepspeed") is None,
            reason="there is no deepspeed; .ci/run installs it into .work/deepspeed",
        ),
        pytest.mark.skipif(
            " " in sys.prefix,
            reason="torch does not quote the path of its libraries when it links DeepSpeed's operation",
        ),
    ],
}
WAYS["zero3"] = WAYS["zero2"]
Alone = Callable[..., Path]


@pytest.fixture(scope="module")
def alone_trained(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """What one process trains, once for the tests that compare with it. To be read, never written."""
    found: dict[str, Path] = {}

    def train(**changes: Any) -> Path:
        if str(changes) not in found:
            folder = make(tmp_path_factory.mktemp("alone") / "one", **changes)
            command = [sys.executable, "stages/train_model.py", "pretrain"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            found[str(changes)] = folder
        return found[str(changes)]

    return train


WHOLE: dict[str, Any] = {}
ADAPTER: dict[str, Any] = {"lora": LORA}
BF16: dict[str, Any] = {"bf16": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo on a CPU")
@pytest.mark.parametrize(
    ("how", "changes", "tolerance"),
    [
        pytest.param("ddp", WHOLE, 1e-4, marks=WAYS["ddp"], id="ddp-whole"),
        pytest.param("ddp", ADAPTER, 1e-4, marks=pytest.mark.slow, id="ddp-lora"),
        pytest.param("fsdp", WHOLE, 1e-4, marks=WAYS["fsdp"], id="fsdp-whole"),
        pytest.param("fsdp", ADAPTER, 1e-4, marks=WAYS["fsdp"], id="fsdp-lora"),
        pytest.param("fsdp", BF16, 2e-3, marks=WAYS["fsdp"], id="fsdp-bf16"),
        pytest.param("zero2", WHOLE, 1e-4, marks=WAYS["zero2"], id="zero2-whole"),
        pytest.param("zero2", ADAPTER, 1e-4, marks=WAYS["zero2"], id="zero2-lora"),
        pytest.param("zero3", WHOLE, 1e-4, marks=WAYS["zero3"], id="zero3-whole"),
        pytest.param("zero3", ADAPTER, 1e-4, marks=WAYS["zero3"], id="zero3-lora"),
        pytest.param("zero3", BF16, 2e-3, marks=WAYS["zero3"], id="zero3-bf16"),
    ],
)
def test_two_processes_train_the_model_of_one(
    tmp_path: Path, run_stage: Runner, alone_trained: Alone, how: str, changes: dict[str, Any], tolerance: float
) -> None:
    """The same receipts, losses within 1e-4, one writer; the model is whole, with the dtypes of one process."""
    if changes == BF16 and not train_loop.has_bf16():
        pytest.skip("this CPU has no bfloat16")
    one, two = alone_trained(**changes), make(tmp_path / "two", **changes)
    done = run_stage(two, "train_model", "pretrain", **launch(how, tmp_path / "site"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step 6 of 6, loss") == 1
    assert how != "fsdp" or (tmp_path / "site/seen").is_file()
    assert not (tmp_path / "site/ended").exists(), "what gloo's threads hold can abort an interpreter that ends"
    assert how[:4] != "zero" or "DeepSpeed" in done.stdout
    assert (trained(one) / "receipts.bin").read_bytes() == (trained(two) / "receipts.bin").read_bytes()
    for ours, theirs in zip(curve(one), curve(two), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=tolerance)
        assert ours[1] == pytest.approx(theirs[1], rel=tolerance)  # a norm of 9 here
    name = "adapter_model.safetensors" if "lora" in changes else "model.safetensors"
    weights = [load_file(trained(folder) / name) for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for key, weight in weights[0].items():
        assert weight.dtype == weights[1][key].dtype
        assert torch.allclose(weight, weights[1][key], atol=10 * tolerance)
    assert sorted(path.name for path in trained(one).iterdir()) == sorted(path.name for path in trained(two).iterdir())
    assert not (two / ".work/train_model@pretrain").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo on a CPU")
@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param(how, marks=marks) for how, marks in WAYS.items()])
def test_two_processes_go_on_after_a_kill(tmp_path: Path, run_stage: Runner, alone_trained: Alone, how: str) -> None:
    """None survives the stage that started them; the checkpoint is the one of all."""
    changes: dict[str, Any] = {"max_steps": 20, "eval_steps": 20}
    one, two = alone_trained(**changes), make(tmp_path / "two", **changes)
    environment = launch(how, tmp_path / "site")
    kill_at(two, ".work/train_model@pretrain/*/checkpoint-*/whole", "train_model", "pretrain", **environment)
    deadline = time.monotonic() + 60
    while running(two):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not trained(two).exists()
    if how == "zero3":
        refused = run_stage(two, "train_model", "pretrain")
        assert refused.returncode == 1 and "from which whole models cannot go on" in refused.stderr
    again = run_stage(two, "train_model", "pretrain", **environment)
    assert "going on from step" in again.stdout, again.stdout + again.stderr
    assert (trained(one) / "receipts.bin").read_bytes() == (trained(two) / "receipts.bin").read_bytes()
    for ours, theirs in zip(curve(one), curve(two), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo on a CPU")
@pytest.mark.slow
def test_one_process_goes_on_from_the_checkpoint_of_two(
    tmp_path: Path, run_stage: Runner, alone_trained: Alone
) -> None:
    changes: dict[str, Any] = {"max_steps": 20, "eval_steps": 20}
    one, two = alone_trained(**changes), make(tmp_path / "two", **changes)
    environment = launch("ddp", tmp_path / "site")
    kill_at(two, ".work/train_model@pretrain/*/checkpoint-*/whole", "train_model", "pretrain", **environment)
    again = run_stage(two, "train_model", "pretrain")
    assert "going on from step" in again.stdout, again.stdout + again.stderr
    assert (trained(one) / "receipts.bin").read_bytes() == (trained(two) / "receipts.bin").read_bytes()
    for ours, theirs in zip(curve(one), curve(two), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_checkpoint_in_parts_is_for_the_same_launch_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = SimpleNamespace(deepspeed_plugin=None)
    zero3 = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    monkeypatch.setenv("WORLD_SIZE", "2")
    forms = {train_loop.form(plain): plain, train_loop.form(zero3): zero3}
    assert list(forms) == ["", "DeepSpeed ZeRO 3, 2 processes"]
    for written in forms:
        (tmp_path / train_loop.MARKER).write_text(written)
        for going_on, settings in forms.items():
            if written == going_on:
                train_loop.check_form(tmp_path, settings)
            else:
                with pytest.raises(SystemExit, match="start it as before, or remove"):
                    train_loop.check_form(tmp_path, settings)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train_loop.form(plain) == "FSDP"


@pytest.mark.parametrize(
    "changes", [{"optim": "muon"}, {"optim": "adafactor"}, {"optim": "lion_8bit"}, {"fp16": True}], ids=str
)
def test_what_cannot_be_had_in_parts_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="leave FSDP and DeepSpeed out"):
        train_loop.check_parts(Params(**{**SETTINGS, **changes}))
    train_loop.check_parts(Params(**SETTINGS))


def test_deepspeed_holds_32_bits_and_can_be_published() -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    distributed.as_one_process(config, bf16=True)
    assert config["torch_autocast"]["enabled"] and "bf16" not in config
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


def running(folder: Path) -> list[int]:
    """Return the processes that work in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if path.readlink() == folder:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_mistake_in_a_worker_is_one_sentence(tmp_path: Path, run_stage: Runner) -> None:
    folder = make(tmp_path / "p", lora={**LORA, "target_modules": ["no_such_layer"]})
    done = run_stage(folder, "train_model", "pretrain", NUM_PROCESSES="2")
    assert done.returncode == 1 and "the model has no layer no_such_layer" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("train_model@pretrain: a worker failed")
    assert not trained(folder).exists()
