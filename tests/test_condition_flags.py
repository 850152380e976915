"""Flags of attacks, rules, privacy and participation: what they build, and what is refused."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flag_lines import build, resolve

from experiments.entry import UserError
from zofl_jax.conditions import accounting
from zofl_jax.configuration import choices, wrapping
from zofl_jax.configuration.phases import build_phases
from zofl_jax.engine import ledger, simulation
from zofl_jax.training import described, summaries

SMALL = ("--num_clients=6", "--clients_per_round=5", "--batch_size=8", "--perturbation=rademacher")


def ran(*arguments, rounds=3):
    simulator = build(*SMALL, *arguments).simulator
    return simulator, simulation.run(simulator, rounds=rounds)


@functools.cache
def plain() -> simulation.Simulator:
    return build().simulator


def test_by_default_nothing_goes_wrong():
    simulator = plain()
    assert simulator.epsilon is None
    assert simulator.conditions.adversary is None
    assert simulator.conditions.attend is None
    assert simulator.conditions.max_message == 1e6
    assert not simulator.phases[0].algorithm.late_uploads


@pytest.mark.parametrize("attack", choices.ATTACKS[1:])
def test_every_attack_has_its_malicious_clients(attack):
    config = resolve(f"--attack={attack}", "--malicious_share=0.3")
    adversary = wrapping.build(config, plain().task, plain().root).adversary
    assert int(adversary.malicious.sum()) == 6
    assert (adversary.attack is None) == (attack == "label_flip")
    assert (adversary.data_attack is None) != (attack == "label_flip")


@pytest.mark.parametrize("algorithm", ["decomfl", "fedsgd"])
def test_every_rule_is_that_of_the_algorithm(algorithm):
    """Three uploads that agree are the broadcast of every rule but the majority's sign."""
    broadcast = build(f"--algorithm={algorithm}").simulator.broadcasts[0]
    one = jax.tree.map(lambda b: 1e-3 * np.ones((3, *b.shape), b.dtype), broadcast)
    for aggregator in choices.AGGREGATORS:
        config = resolve(f"--aggregator={aggregator}", f"--algorithm={algorithm}")
        (phase,) = build_phases(config, plain().task)
        value = 1.0 if aggregator == "majority_sign" else 1e-3
        for leaf in jax.tree.leaves(jax.jit(phase.algorithm.aggregate)(one, np.ones(3))):
            np.testing.assert_allclose(leaf, value, rtol=1e-5)


def test_scaffold_counts_who_is_heard_under_any_rule():
    config = resolve("--algorithm=scaffold", "--aggregator=median")
    (phase,) = build_phases(config, plain().task)
    uploads = {"params": jnp.ones((4, 2)), "control": jnp.ones((4, 2))}
    broadcast = phase.algorithm.aggregate(uploads, jnp.array([1.0, 1.0, 0.0, 1.0]))
    np.testing.assert_allclose(broadcast["params"], 1)
    np.testing.assert_allclose(broadcast["control"], 0.75)


def test_a_server_survives_attackers_and_counts_what_it_rejects():
    simulator, progress = ran("--attack=nan", "--malicious_share=0.34", "--aggregator=median")
    malicious = np.asarray(simulator.conditions.adversary.malicious)
    assert malicious.sum() == 2
    expected = int(malicious[simulator.cohorts(np.arange(3))].sum())
    assert progress.history[-1].rejected == expected > 0
    assert math.isfinite(progress.history[-1].metrics["loss"])


@pytest.mark.parametrize("compression", ["float16", "int8"])
def test_bad_messages_are_seen_in_compressed_uploads(compression):
    arguments = f"--compression={compression}", "--attack=out_of_range", "--malicious_share=0.34"
    simulator, progress = ran(*arguments, rounds=1)
    malicious = np.asarray(simulator.conditions.adversary.malicious)
    expected = int(malicious[simulator.cohorts(np.arange(1))].sum())
    assert progress.ledger.rejected == expected > 0


def test_private_clients_in_a_secure_sum():
    simulator, progress = ran(
        "--dp=client", "--dp_noise=2", "--dp_clip=5", "--secure_sum", "--dropout=0.2"
    )
    assert simulator.sizes[0].upload == 4 * 4 * 20
    spent = progress.history[-1].epsilon
    assert spent == simulator.epsilon(progress.ledger) > 0
    assert sum(progress.ledger.contributors.values()) == 3


def test_private_examples():
    simulator, progress = ran("--dp=example", "--dp_noise=4", "--local_steps=2", rounds=2)
    spent = progress.history[-1].epsilon
    smallest = int(np.diff(np.asarray(simulator.task.train.offsets)).min())
    assert spent == accounting.example_epsilon(
        2 * int(progress.ledger.times.max()),
        noise_multiplier=4.0,
        batch_size=8,
        num_examples=smallest,
        delta=1e-5,
    )


def test_the_private_bits_of_feedsign_are_accounted_for():
    arguments = ("--algorithm=feedsign", "--feedsign_epsilon=0.5", "--num_perturbations=2")
    spent = build(*arguments).simulator.epsilon
    book = ledger.Ledger(20)
    sizes = plain().sizes[0]
    for cohort in ([0, 1], [1, 2], [1, 5]):
        book.record(cohort, sizes)
    assert spent(book) == accounting.bit_epsilon(6, epsilon=0.5, delta=1e-5)


def test_clients_that_come_and_go():
    arguments = (
        *SMALL,
        "--dropout=0.1",
        "--deadline=1.2",
        "--late_weight=0.5",
        "--late_joiners=0.5",
        "--join_by=3",
        "--availability=4:0.75",
    )
    config = resolve(*arguments)
    experiment = build(*arguments)
    simulator = experiment.simulator
    progress = simulation.run(simulator, rounds=3)
    found = simulator.attendance(np.arange(3))
    assert found.there.sum() > found.in_time.sum()
    assert progress.ledger.totals.upload == found.uploaded.sum() * simulator.sizes[0].upload
    # Clients that are not there compute nothing; those whose upload is lost or late do.
    summary = summaries.summarise(simulator, progress, described.about(config, experiment))
    assert found.there.sum() < found.there.size
    expected = int(found.there.sum()) * simulator.phases[0].algorithm.passes.forward
    assert summary["forward_passes"] == summary["history"][-1]["forward_passes"] == expected


def test_an_availability_trace_from_a_file(tmp_path):
    trace = np.zeros((2, 6), bool)
    trace[0, :2] = trace[1, 3:] = True
    np.save(tmp_path / "trace.npy", trace)
    simulator = build(*SMALL, f"--availability={tmp_path / 'trace.npy'}").simulator
    assert simulator.attendance(np.arange(2)).there.sum(axis=1).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--trimmed_share=0.1"], "--trimmed_share has no effect without --aggregator=trimmed"),
        (["--num_byzantine=1"], "has no effect without --aggregator=krum or multi_krum"),
        (["--malicious_share=0.1"], "has no effect without an --attack"),
        (["--attack=alie", "--attack_size=2"], "--attack_size has no effect without --attack="),
        (["--dp_clip=2"], "--dp_clip has no effect without --dp"),
        (["--secure_bits=8"], "has no effect without --secure_sum"),
        (["--late_weight=0.5"], "has no effect without a --deadline"),
        (["--join_by=5"], "has no effect without --late_joiners"),
        (["--attack=nan", "--malicious_share=1.5"], "must be in [0, 1], got 1.5"),
        (["--max_message=0"], "--max_message must be positive, got 0.0"),
        (["--aggregator=trimmed_mean", "--trimmed_share=0.5"], "[0, 0.5), got 0.5"),
        (["--aggregator=krum", "--num_byzantine=2"], "needs a cohort of 7 or more, got"),
        (["--attack=trim", "--attack_size=0.5"], "must be above 1, got 0.5"),
        (["--attack=scaling", "--algorithm=feedsign"], "whose uploads are signs alone: use"),
        (["--attack=trim", "--attack_size=3", "--algorithm=feedsign"], "more than signs"),
        (["--attack=alie", "--algorithm=fedkseed"], "whose clients share no directions: use"),
        (["--attack=nan", "--secure_sum"], "whose uploads are integers: use --attack=sign_flip"),
        (["--aggregator=median", "--algorithm=fedkseed"], "not possible with --algorithm=fedk"),
        (["--aggregator=krum", "--algorithm=decomfl_groups"], "whose uploads are no numbers"),
        (["--attack=krum", "--algorithm=decomfl_groups"], "whose clients share no directions"),
        (["--late_weight=0.5", "--deadline=2", "--algorithm=decomfl_groups"], "are no numbers"),
        (["--attack=label_flip", "--task=quadratic"], "needs labels, which --task=quadratic"),
        (["--secure_sum", "--aggregator=median"], "use --aggregator=mean"),
        (["--secure_sum", "--weighting=examples"], "use --weighting=uniform"),
        (["--secure_sum", "--secure_bits=30"], "overflows 32 bits"),
        (["--dp=client", "--aggregator=median"], "the noise is that of a mean"),
        (["--dp=client", "--weighting=examples"], "that of a uniform mean"),
        (["--dp=client", "--compression=float16"], "ε is that of the noisy sum"),
        (["--dp=example", "--mask=sensitivity"], "use --mask=random or --mask=magnitude"),
        (["--feedsign_epsilon=1", "--algorithm=feedsign", "--mask=sensitivity"], "make it, which"),
        (["--secure_sum", "--max_message=9"], "--max_message has no effect without uploads of fl"),
        (["--algorithm=feedsign", "--max_message=9"], "--max_message has no effect without"),
        (["--deadline=1", "--late_weight=1", "--algorithm=hiso"], "keeps no curvature of the"),
        (["--deadline=1", "--late_weight=1", "--algorithm=scaffold"], "no longer be the mean"),
        (["--attack=nan", "--malicious_share=0.02"], "--malicious_share=0.02 of 20 clients is"),
        (
            ["--attack=label_flip", "--malicious_share=0"],
            "share of 0.05 or more, or leave out --att",
        ),
        (["--late_joiners=0.02"], "--late_joiners=0.02 of 20 clients is nobody"),
        (["--dp=client", "--availability=4:0.5"], "cohorts from the whole population"),
        (["--dp=client", "--attack=nan"], "malicious clients add no noise"),
        (["--dp=client", "--algorithm=feedsign"], "not possible with --algorithm=feedsign"),
        (["--dp=client", "--dp_delta=1"], "--dp_delta must be in (0, 1), got 1.0"),
        (["--dp=client", "--dp_noise=-1"], "--dp_noise must be >= 0, got -1.0"),
        (["--dp=example", "--algorithm=fedavg"], "use a zeroth-order algorithm, or --dp=client"),
        (["--dp=example", "--clients_at_once=2"], "--clients_at_once=2 is not possible"),
        (["--deadline=0"], "--deadline must be positive, got 0.0"),
        (["--dropout=1"], "--dropout must be in [0, 1), got 1.0"),
        (["--deadline=1", "--time_spread=-1"], "--time_spread must be >= 0, got -1.0"),
        (["--availability=daily"], "neither PERIOD:SHARE, as in 24:0.5, nor a .npy file"),
        (["--availability=0:0.5"], "must be >= 1, got 0"),
        (["--availability=no.npy"], "--availability=no.npy can't be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_flags_that_make_no_sense_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        build(*arguments)
