"""Several processes train one model: the stage keeps lock, inputs and publishing, and starts workers that compute.

    NUM_PROCESSES=2 python stages/train_model.py PHASE                        # torchrun: CPUs too, over gloo
    ACCELERATE_CONFIG_FILE=docs/accelerate/fsdp.yaml python stages/train_model.py PHASE     # FSDP, DeepSpeed, ...

How many take part changes no result beyond rounding, so it stands in the environment and not in params.yaml. The blocks
of a step are the next `global_batch_size` of the frozen order for any number of processes: accelerate deals the stream
of small batches to the processes in turn, and each accumulates `accumulation` of them.

Example, global_batch_size 8, per_device_train_batch_size 2, order 2 0 5 16 13 19 10 17: one process accumulates the
small batches 2 0 | 5 16 | 13 19 | 10 17, two have 2 0 | 13 19 and 5 16 | 10 17: the same step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from kit import stage

WORKER = "TERROIR_WORKER"  # what a worker needs from the stage that started it, as JSON
RESULT = "result.json"  # what the stage wants to know from its workers, in the folder of checkpoints


def processes() -> int:
    """Return how many processes train: WORLD_SIZE; unless in a worker NUM_PROCESSES, the config file's number; or 1."""
    text = os.environ.get("WORLD_SIZE")
    if text is None and worker() is None:
        text = os.environ.get("NUM_PROCESSES") or str(_config().get("num_processes", 1))
    text = text or "1"
    if not (text.isdecimal() and int(text) > 0):
        where = "NUM_PROCESSES" if os.environ.get("NUM_PROCESSES") else "num_processes of ACCELERATE_CONFIG_FILE"
        raise SystemExit(f"{where} is {text!r}: set it to a whole number of processes, 1 or more.")
    return int(text)


def _config() -> dict[str, Any]:
    """Return what accelerate's config file says, {} where none is named."""
    name = os.environ.get("ACCELERATE_CONFIG_FILE")
    if not name:
        return {}
    if not Path(name).is_file():
        raise SystemExit(f"ACCELERATE_CONFIG_FILE is {name}, which is no file; see docs/accelerate.")
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = YAML(typ="safe").load(Path(name).read_bytes()) or {}
    except YAMLError as error:
        raise SystemExit(f"{name} is no YAML ({' '.join(str(error).split())[:200]}); see docs/accelerate.") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{name} holds no keys of accelerate's; see docs/accelerate.")
    return found


def first() -> bool:
    """Return whether this process is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def worker() -> dict[str, Any] | None:
    """Return what the stage told this process, when it is a worker, else None."""
    return json.loads(os.environ[WORKER]) if WORKER in os.environ else None


def wanted() -> bool:
    """Return whether this process shall start workers and not train itself."""
    return worker() is None and (processes() > 1 or "ACCELERATE_CONFIG_FILE" in os.environ)


def sharing() -> str:
    """Return what shares the weights among the processes, "FSDP" or "DeepSpeed"; "" where each has all of them."""
    names = ("FSDP", "DeepSpeed")
    return next((name for name in names if os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true"), "")


def as_one_process(config: dict[str, Any], bf16: bool) -> None:
    """Change a configuration of DeepSpeed's so that it trains and publishes what one process would.

    Its own bf16 would hold the weights in 16 bits and publish them so; small changes of them would be lost.
    """
    config["torch_autocast"] = {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # of 32 bits, as they are


def accumulation(global_batch_size: int, rows: int, world: int) -> int:
    """Return how many batches of `rows` blocks each of `world` processes sums up to a step.

    >>> accumulation(8, 2, 1), accumulation(8, 2, 2)
    (4, 2)
    """
    if global_batch_size % (rows * world):
        raise SystemExit(
            f"global_batch_size {global_batch_size} is no multiple of per_device_train_batch_size {rows} x {world} "
            "processes; start another number of them."
        )
    return global_batch_size // (rows * world)


def command(script: str, *arguments: str) -> list[str]:
    """Return the command that runs `script` in several processes.

    With a config file that is `accelerate launch`, else torchrun: accelerate 1.15 starts a single process where
    distributed_type is NO or MULTI_CPU, whatever number it is told, and as many as it is told for MULTI_GPU, FSDP and
    DEEPSPEED, on a CPU, too.
    """
    config, number = os.environ.get("ACCELERATE_CONFIG_FILE"), processes()
    if not config:
        how = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    else:
        kind = str(_config().get("distributed_type", "NO"))
        if kind in ("NO", "MULTI_CPU") and number > 1:
            raise SystemExit(
                f"{config} has distributed_type {kind}, of which accelerate starts one process and not {number}; "
                f"for {number} on a CPU set NUM_PROCESSES and no ACCELERATE_CONFIG_FILE."
            )
        how = ["accelerate.commands.launch", "--config_file", config]
        if _config().get("main_process_port") is None:
            # A free one: accelerate's is 29500, on which two trainings that start together would meet.
            how += ["--main_process_port", "0"]
        how += ["--num_processes", os.environ["NUM_PROCESSES"]] if "NUM_PROCESSES" in os.environ else []
    return [sys.executable, "-m", *how, script, *arguments]


def train(name: str, work: Path, told: dict[str, Any], script: str, *arguments: str) -> dict[str, Any]:
    """Run `script` in workers that are `told` this, and return what the first one leaves in `work`.

    Raises SystemExit when one of them fails. They end with this process, whatever ends it: each asks to be killed with
    its parent, as stages do.
    """
    environment = {**os.environ, WORKER: json.dumps(told)}
    done = subprocess.Popen(command(script, *arguments), env=environment, preexec_fn=stage.die_with_parent).wait()
    if done:
        raise SystemExit(f"{name}: a worker failed (see above); the checkpoints before that are kept.")
    path = work / RESULT
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return found


def finish(work: Path, found: dict[str, Any]) -> NoReturn:
    """Leave what the stage wants to know, if this is the first worker, and end.

    The interpreter is not brought to its end: what gloo's threads still hold can abort it there (pytorch/pytorch pull
    request 179291), and with this worker the training; closing the group of processes first can wait for ever.
    """
    if first():
        (work / RESULT).write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
