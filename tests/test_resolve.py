"""Settings become a config in one order of layers, by a pure function; nothing is compiled."""

import dataclasses
import re

import numpy as np
import pytest

from experiments import flags as command_line
from zofl_jax.algorithms import METHODS
from zofl_jax.configuration import experiment, kinds, needs, rates
from zofl_jax.configuration import resolve as resolving
from zofl_jax.configuration.config import GROUPS, Config, everything, general
from zofl_jax.configuration.messages import Upload, kind_of_upload
from zofl_jax.configuration.resolve import resolve
from zofl_jax.models import images, mlp
from zofl_jax.settings import Setting, at_least, setting, settings_of

TASKS = {
    "digits": {"task": "digits"},
    "idx": {"task": "idx", "data_dir": "/data"},
    "quadratic": {"task": "quadratic"},
    "reviews": {"task": "reviews"},
    "text": {"task": "text", "data_dir": "x.tsv", "model": "hf:x", "verbalizers": "0=bad,1=good"},
    "sst2-like": {"task": "sst2", "model": "hf:x"},
    "squad-like": {"task": "squad", "model": "hf:x"},
}
LAYERED = (
    *("num_clients", "clients_per_round", "local_steps", "num_perturbations", "estimator"),
    *("batch_size", "momentum", "optimizer", "weight_decay"),
)
"""Settings that differ by kind of task or method."""

# P, K, clients, cohort, batch, momentum, estimator: of images, of texts, of the quadratic.
IMAGES, TEXTS, QUADRATIC = (
    {"num_clients": 20, "clients_per_round": 5, "local_steps": 4, "num_perturbations": 20},
    {"num_clients": 8, "clients_per_round": 2, "local_steps": 1, "num_perturbations": 5},
    {"num_clients": 20, "clients_per_round": 5, "local_steps": 4, "num_perturbations": 20},
)
IMAGES |= {"batch_size": 32, "momentum": 0.9, "estimator": "central"}
TEXTS |= {"batch_size": 16, "momentum": 0.0, "estimator": "forward"}
QUADRATIC |= {"batch_size": 1, "momentum": 0.9, "estimator": "central"}
OWN = {
    "decomfl": {},
    "decomfl_groups": {},
    "hiso": {"momentum": 0.0},
    "fedkseed": {"momentum": 0.0, "local_steps": 200, "num_perturbations": 1},
    "fedkseed_pro": {"momentum": 0.0, "local_steps": 200, "num_perturbations": 1},
    "feedsign": {"momentum": 0.0, "local_steps": 1, "num_perturbations": 1},
    "fedzo": {"momentum": 0.0},
    "mezo": {
        **{"momentum": 0.0, "local_steps": 1, "num_perturbations": 1, "estimator": "central"},
        **{"num_clients": 1, "clients_per_round": 1},
    },
    "fedavg": {"momentum": 0.0},
    "fedprox": {"momentum": 0.0},
    "fedsgd": {"momentum": 0.0, "local_steps": 1},
    "fedadam": {"momentum": 0.0},
    "fedyogi": {"momentum": 0.0},
    "fedadagrad": {"momentum": 0.0},
    "scaffold": {"momentum": 0.0},
    "ferret": {"momentum": 0.0, "num_perturbations": 320},
    "hybrid": {"momentum": 0.0},
}
"""What each method has by default whatever the task: the papers' settings, written out."""


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_kind_of_task_has_its_defaults(method, task):
    base = {"quadratic": QUADRATIC, "digits": IMAGES, "idx": IMAGES}.get(task, TEXTS)
    config = resolve({**TASKS[task], "algorithm": method})
    expected = {"optimizer": "sgd", "weight_decay": 0.0, **base, **OWN[method]}
    assert {name: config.get(name) for name in LAYERED} == expected
    assert config.learning_rate > 0
    assert Config.from_flat(config.flat()) == config


def test_mezo_on_texts_is_mezo():
    config = resolve({"task": "reviews", "algorithm": "mezo"})
    found = config.num_clients, config.clients_per_round, config.num_perturbations
    assert found == (1, 1, 1)
    assert (config.estimator, config.local_steps) == ("central", 1)


def test_natural_clients_of_snippets_are_their_documents():
    natural = {"task": "editorials", "partition": "natural"}
    config = resolve(natural | {"least_examples": 4})
    assert config.client_column == "document" and config.data_dir
    assert resolve(natural | {"client_column": "writer"}).client_column == "writer"
    with pytest.raises(ValueError, match="--partition=natural needs --client_column"):
        resolve(natural | {"task": "reviews"})


def test_what_is_given_goes_before_methods_and_these_before_tasks():
    texts = {"task": "reviews", "algorithm": "fedkseed"}
    assert resolve(texts).local_steps == 200
    assert resolve(texts | {"local_steps": 7}).local_steps == 7
    with pytest.raises(ValueError, match=r"--num_perturbations=5 is not possible .* always 1"):
        resolve(texts | {"num_perturbations": 5})
    assert resolve(texts | {"num_perturbations": 1}).num_perturbations == 1


SILENT_BEFORE = [
    ({"dirichlet_alpha": 0.5}, "--dirichlet_alpha has no effect with --partition=iid: .* dirichl"),
    ({"noise": 0.1}, "--noise has no effect with --task=digits, it is for quadratic"),
    ({"data_dir": "/data"}, "--data_dir has no effect with --task=digits"),
    (TASKS["quadratic"] | {"partition": "dirichlet"}, "--partition has no effect with --task=qua"),
    (TASKS["quadratic"] | {"objective": "f1"}, "--objective has no effect with --task=quadratic"),
    (TASKS["sst2-like"] | {"text_column": "x"}, "--text_column has no effect with --task=sst2"),
    (TASKS["sst2-like"] | {"held_out": 0.2}, "--held_out has no effect with --task=sst2"),
    (TASKS["sst2-like"] | {"lora_alpha": 8.0}, "--lora_alpha has no effect without a --lora_rank"),
    (TASKS["sst2-like"] | {"max_new_tokens": 8}, "--max_new_tokens has no effect with classes"),
    (TASKS["sst2-like"] | {"client_column": "x"}, "--client_column has no .* choose natural"),
    (TASKS["text"] | {"template": "{a}", "text_column": "a"}, "a --template, which names its col"),
    ({"partition": "natural", "num_clients": 9}, "natural, where owners are the clients"),
    ({"shards_per_client": 3}, "--shards_per_client has no effect with --partition=iid"),
    ({"missing_owner": "drop"}, "--missing_owner has no effect with --partition=iid"),
    ({"least_examples": 4}, "--least_examples has no effect with --partition=iid"),
    ({"shots": 4}, "--shots has no effect with --task=digits, it is for texts"),
]


@pytest.mark.parametrize(("given", "message"), SILENT_BEFORE, ids=lambda each: str(each)[:40])
def test_a_setting_without_effect_is_refused_with_the_reason(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape('--')}.*{message.removeprefix('--')}"):
        resolve(given)


def test_held_out_rows_of_a_folder_are_its_own(tmp_path):
    given = TASKS["text"] | {"data_dir": str(tmp_path), "held_out": 0.2}
    with pytest.raises(ValueError, match=r"--held_out has no effect .* a folder with files"):
        resolve(given)
    assert resolve(TASKS["text"] | {"held_out": 0.2}).held_out == 0.2


def test_settings_from_python_are_checked_as_flags_are():
    assert resolve({"learning_rate": np.float32(0.5), "rounds": 3}).learning_rate == 0.5
    assert resolve({"momentum": 0, "data_dir": None}).momentum == 0.0
    for given, message in [
        ({"round": 3}, "there is no setting 'round'; rounds?"),
        ({"rounds": 3.0}, "--rounds must be a whole number, got 3.0"),
        ({"rounds": True}, "--rounds must be a whole number, got True"),
        ({"secure_sum": 1}, "--secure_sum must be True or False, got 1"),
        ({"algorithm": "fedmagic"}, "--algorithm must be decomfl or decomfl_groups or hiso or "),
        ({"task": "nonsense"}, "--task=nonsense is unknown; use digits, idx, npz, "),
        ({"seed": -1}, "--seed must be in [0, 2**32), got -1"),
        ({"smoothing": float("nan")}, "--smoothing must be finite, got nan"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            resolve(given)


def test_resolving_changes_nothing_and_reads_no_flag(monkeypatch):
    given = {"algorithm": "hiso", "hiso_nu": 0.1}
    monkeypatch.setattr(command_line.FLAGS["hiso_nu"], "value", 0.5)
    first, second = resolve(given), resolve(given)
    assert given == {"algorithm": "hiso", "hiso_nu": 0.1}
    assert first == second and first.options.hiso_nu == 0.1
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.rounds = 3
    assert first.replace(rounds=3, hiso_nu=0.2).options.hiso_nu == 0.2
    assert first.given == {"algorithm", "hiso_nu"}


def test_what_a_comparison_shares_may_be_without_effect_and_nothing_else_may():
    given = {"algorithm": "fedavg", "smoothing": 0.1}
    assert resolve(given, shared=("smoothing",)).algorithm == "fedavg"
    with pytest.raises(ValueError, match="--smoothing has no effect with --algorithm=fedavg"):
        resolve(given)
    with pytest.raises(ValueError, match="--hiso_nu has no effect"):
        resolve({"algorithm": "fedavg", "hiso_nu": 0.1}, shared=("hiso_nu",))


def test_uploads_are_told_by_their_shapes():
    found = {name: kind_of_upload(name) for name in METHODS}
    scalars = ("decomfl", "hiso", "mezo", "ferret")
    special = {"feedsign": Upload.BITS, "scaffold": Upload.TREES, "hybrid": Upload.TREES}
    special |= dict.fromkeys(("fedkseed", "fedkseed_pro", "decomfl_groups"), Upload.SEEDS)
    special |= dict.fromkeys(scalars, Upload.SCALARS)
    assert found == {name: special.get(name, Upload.PARAMS) for name in METHODS}


def test_every_setting_belongs_to_one_group_and_has_help():
    names = [name for group in GROUPS for name in settings_of(group)]
    assert len(names) == len(set(names)) == len(general())
    own = set(everything()) - set(general())
    assert own == {n for method in METHODS.values() for n in settings_of(method.options)}
    for each in everything().values():
        assert each.help.endswith(".")
        assert each.default is None or each.checked(each.default) == each.default


def test_the_help_shows_every_setting_once_with_its_choices_and_its_defaults_by_method():
    text = command_line.help_of_settings()
    for name in everything():
        assert len(re.findall(rf"^  --{name}( |$)", text, re.M)) == 1, name
    flat = " ".join(text.split())
    directions = (
        "Unless given, texts: 5; fedkseed, fedkseed_pro: always 1; feedsign, mezo: 1; ferret: 320."
    )
    assert f"of a round where its change is projected on them. {directions}" in flat
    assert "One of iid, dirichlet, shards, natural." in flat
    assert "Of fedadam, fedyogi, fedadagrad, scaffold, ferret alone:" in text


def test_a_setting_says_what_is_wrong_with_a_value():
    rank = Setting("rank", 1, "Rank.", int, None, at_least(1))
    assert rank.checked(3) == 3
    with pytest.raises(ValueError, match=r"^--rank must be >= 1, got 0$"):
        rank.checked(0)

    @dataclasses.dataclass(frozen=True)
    class Group:
        kind: str = setting("a", "Kind.", choices="ab")
        size: float | None = setting(None, "Size.", least=0)

    found = settings_of(Group)
    assert (found["kind"].kind, found["size"].kind) == (str, float)
    assert found["size"].checked(None) is None and found["size"].checked(2) == 2.0
    with pytest.raises(ValueError, match=r"^--kind must be a or b, got 'c'$"):
        found["kind"].checked("c")


def test_a_new_source_of_images_is_one_row(monkeypatch):
    loaded = []
    source = kinds.Images(lambda data_dir: loaded.append(data_dir) or "images", "a folder")
    monkeypatch.setattr(kinds, "IMAGES", {**kinds.IMAGES, "mine": source})
    assert resolve({"task": "mine", "data_dir": "x"}).kind == "images"
    assert kinds.load_images("mine", "x") == "images" and loaded == ["x"]
    with pytest.raises(ValueError, match="--task=mine needs --data_dir=a folder"):
        resolve({"task": "mine"})


def test_a_new_model_of_images_is_one_row(monkeypatch):
    monkeypatch.setattr(images, "MODELS", images.MODELS | {"mine": images.ImageModel(mlp.Softmax)})
    for module in (resolving, rates, experiment):
        monkeypatch.setattr(module, "MODELS", images.MODELS)
    config = resolve({"model": "mine", "num_clients": 4, "clients_per_round": 2})
    assert 0 < config.learning_rate < resolve({}).learning_rate
    built = experiment.build(config, 1)
    assert built.simulator.evaluate(built.task.init(built.simulator.root.init))["accuracy"] < 0.5


def test_runs_of_methods_that_are_not_here_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"the run's method is 'jax 0.10.2, .*zofl.train"):
        Config.from_flat({"algorithm": "jax 0.10.2, from round 0 abc", "task": "digits"})
    assert Config.from_flat({"hiso_nu": 0.5, "of_a_later_release": 1}) == Config(
        options=METHODS["decomfl"].options()
    )


def test_needs_are_of_settings_that_there_are():
    assert set(needs.NEEDS) <= set(everything())
