"""Makes the runs of this folder, with the code that is on Python's path.

    PYTHONPATH=CHECKOUT python tests/earlier_runs/make.py VERSION FOLDER [NAME ...]

Each is a small run of 12 rounds and what the same code made of it in 20: a folder with the files
of the run at round 12, `expected.json` and `params.npz`. Those that are already there are not for
making again: they show that runs of earlier versions go on.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import earlier

SHARED = (
    *("--task=digits", "--model=softmax", "--num_clients=10", "--clients_per_round=4"),
    *("--batch_size=16", "--eval_every=4"),
)

RUNS = {
    "decomfl_momentum": "--local_steps=4 --num_perturbations=5 --momentum=0.9",
    "decomfl_late": "--num_perturbations=8 --optimizer=adam --learning_rate=0.01 --dropout=0.2 "
    "--deadline=1.2 --late_weight=0.5 --late_joiners=0.3 --join_by=10",
    "decomfl_private": "--num_perturbations=8 --dp=client --dp_clip=5 --dp_noise=1",
    "hiso_phases": "--algorithm=hiso --num_perturbations=4 --schedule=6:lr=0.8,P=2;10:lr=0.5,P=4",
    "fedkseed": "--algorithm=fedkseed --local_steps=4 --pool_size=32",
    "fedavg_int8": "--algorithm=fedavg --local_steps=4 --compression=int8",
    "fedavg_top_k": "--algorithm=fedavg --local_steps=4 --compression=top_k --top_k_fraction=0.1",
}

KILLED = ("decomfl_momentum", "hiso_phases", "fedkseed", "fedavg_int8")
"""Runs that are left as one killed after round 12: without a last snapshot and a summary.

Clients of the others keep something between rounds, which is in snapshots alone, or are private."""


def main(version: str, folder: Path, *names: str) -> None:
    for name in names or RUNS:
        flags = RUNS[name]
        made = folder / name
        command("train", made, *SHARED, *flags.split(), f"--rounds={earlier.STOPPED}")
        for figure in made.glob("*.png"):
            figure.unlink()
        if name in KILLED:
            (made / "summary.json").unlink()
            (made / "snapshots" / f"{earlier.STOPPED:08d}.snapshot").unlink()
        (made / "lock").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            gone_on = Path(temporary) / name
            shutil.copytree(made, gone_on)
            command("train", gone_on, f"--rounds={earlier.ROUNDS}", *SHARED, *flags.split())
            said = command("replay", gone_on, f"--out={made / 'params.npz'}")
            assert "bit-identical" in said, said
            expected = {
                "version": version,
                "flags": [*SHARED, *flags.split()],
                "machine": earlier.machine(),
                **earlier.facts(gone_on),
            }
        (made / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        with closing(sqlite3.connect(made / "log.sqlite")) as log:
            assert log.execute("SELECT count(*) FROM rounds").fetchone() == (earlier.STOPPED,)


def command(name: str, workdir: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", f"--workdir={workdir}", *arguments],
        env={**os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
