"""Plants faults in a copy of the library, one at a time, and sees whether the tests find them.

    python tests/planted_faults.py                       all of them, some seven minutes of CPU
    python tests/planted_faults.py --only scan_order     some of them
    python tests/planted_faults.py --repo ../other       those of another checkout

Coverage says which lines a test suite runs, and not whether it would notice that one of them is
wrong. So before and after a change to the tests the faults below are planted: each is one that a
reviewer could overlook, in a place where the results stay plausible. A fault names the test files
in which it should be found, the cheapest first, and they run as in `make test`, up to the first
failure. In the end the tests that found the faults run on the unchanged tree, where they must pass.

The exit status is 1 if a fault is not found, can no longer be planted, or keeps the tests from
running at all, or if the unchanged tree fails.
"""

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 1800
"""Seconds after which a run of tests has given no answer."""


class Fault(NamedTuple):
    """A fault, and where it should be found."""

    name: str
    file: str
    old: str  # occurs once in the file
    new: str
    breaks: str  # one sentence
    tests: tuple[str, ...]  # files under tests/, without "test_" and ".py"


FAULTS = (
    # Settings.
    Fault(
        "tasks_before_methods",
        "zofl_jax/configuration/resolve.py",
        "**kind.defaults, **method.defaults, **given}",
        "**method.defaults, **kind.defaults, **given}",
        "What a method is by default gives way to the kind of task: FeedSign on texts has P = 5.",
        ("resolve",),
    ),
    Fault(
        "fixed_before_given",
        "zofl_jax/configuration/resolve.py",
        "    layers |= method.fixed\n",
        "",
        "What a method fixes is left at the defaults: MeZO on texts takes forward differences.",
        ("resolve",),
    ),
    Fault(
        "seeds_taken_for_numbers",
        "zofl_jax/configuration/messages.py",
        "    if not all(floating):\n        return Upload.SEEDS\n",
        "",
        "FedKSeed's pairs of seed and scalar pass for numbers, and a median of seeds is accepted.",
        ("resolve",),
    ),
    # Groups of clients.
    Fault(
        "one_key_for_all_groups",
        "zofl_jax/keys.py",
        "return _settle(jax.random.fold_in(own, group))",
        "return own",
        "All groups of clients have the same directions, and nothing is gained by them.",
        ("decomfl_groups", "oracle"),
    ),
    Fault(
        "groups_averaged_apart",
        "zofl_jax/algorithms/decomfl_groups.py",
        "total = jnp.sum(weights)",
        "total = jnp.sum(jnp.where(member, weights[:, None], 0), 0)",
        "Each group's scalars are averaged, not summed: a lone client counts for many.",
        ("decomfl_groups",),
    ),
    # Scalars of changes, and steps that scalars tell.
    Fault(
        "sketch_of_the_least_error_alone",
        "zofl_jax/directions/sketches.py",
        "factor = own_count / (own_count + rho * (_size(like) + 1))",
        "factor = own_count / (own_count + _size(like) + 1)",
        "Ferret's effective rank is not read: its step is d / r times too short.",
        ("sketches", "ferret"),
    ),
    Fault(
        "one_key_for_all_layers",
        "zofl_jax/directions/sketches.py",
        "own_key = keys.block_key(key, part[0])",
        "own_key = keys.block_key(key, 0)",
        "The layers of a stack are measured along the first one's directions.",
        ("sketches",),
    ),
    Fault(
        "remainder_of_all",
        "zofl_jax/algorithms/ferret.py",
        "memory = difference(change, directions.expand(key, state.params, upload))",
        "memory = change",
        "What was sent is kept as if it had not been, and sent again.",
        ("ferret",),
    ),
    Fault(
        "pool_without_memory",
        "zofl_jax/algorithms/ferret.py",
        "accumulators = accumulators.at[seed].add(scalars)",
        "accumulators = accumulators.at[seed].set(scalars)",
        "Ferret's accumulators hold a seed's last round alone: late clients get another model.",
        ("ferret",),
    ),
    Fault(
        "moment_of_the_squares",
        "zofl_jax/algorithms/step_rules.py",
        "square = jnp.square(jnp.mean(scalars)).astype(jnp.float32)",
        "square = jnp.mean(jnp.square(scalars)).astype(jnp.float32)",
        "MEAZO's second moment is that of each scalar, not of their mean.",
        ("step_rules",),
    ),
    Fault(
        "top_at_the_bottom",
        "zofl_jax/algorithms/hybrid.py",
        "return (x[-count:], x[:-count]) if count else (None, x)",
        "return (x[:count], x[count:]) if count else (None, x)",
        "The first layers are trained by gradients in place of the last.",
        ("hybrid",),
    ),
    Fault(
        "the_first_pair_s_state",
        "zofl_jax/algorithms/warmup.py",
        '{id(algorithm): _one_of(pair, "second", algorithm, rounds) for _, algorithm in rest}',
        '{id(algorithm): _one_of(pair, "first", algorithm, rounds) for _, algorithm in rest}',
        "The method after a warm-up is given the warm-up's optimiser state.",
        ("warmup",),
    ),
    Fault(
        "no_message_across_the_boundary",
        "zofl_jax/engine/ledger.py",
        "self._sync_points += _sync_points(self.num_rounds, self._sizes)",
        "pass",
        "A client that comes after a warm-up is taken to be sent all of its broadcasts.",
        ("warmup",),
    ),
    Fault(
        "one_subspace_for_ever",
        "zofl_jax/algorithms/subspaces.py",
        "own = jax.random.fold_in(key, state.round // rounds)",
        "own = jax.random.fold_in(key, 0)",
        "The subspaces never change.",
        ("subspaces",),
    ),
    Fault(
        "the_papers_length",
        "zofl_jax/directions/perturbations.py",
        "factor = math.sqrt(math.prod(x.shape[lead:]) / (left * right))",
        "factor = 1.0",
        "Subspace directions have not the covariance that is stated.",
        ("subspaces",),
    ),
    Fault(
        "updates_of_any_length",
        "zofl_jax/algorithms/history.py",
        "unit = (c / jnp.where(moved, norm, 1)).astype(q.dtype)",
        "unit = c.astype(q.dtype)",
        "The updates that directions lean towards are not of length 1.",
        ("history",),
    ),
    Fault(
        "sums_along_the_means",
        "zofl_jax/directions/activations.py",
        "return away(found, perturbation.accumulate(direction_keys, params, scalars))",
        "return perturbation.accumulate(direction_keys, params, scalars)",
        "What was measured away from the mean activations is stepped along them too.",
        ("centred",),
    ),
    Fault(
        "means_of_the_last_layer_for_all",
        "zofl_jax/directions/structured.py",
        "watch.add(name, means if name in of_layers else means.sum(0))",
        "watch.add(name, means + 0 * means if name not in of_layers else 0 * means + means[-1])",
        "Each layer of a stack keeps away from the mean inputs of the last one.",
        ("centred",),
    ),
    Fault(
        "means_forgotten_where_nobody_uploads",
        "zofl_jax/algorithms/centred.py",
        "lambda old, new: jnp.where(jnp.any(new != 0), new, old),",
        "lambda old, new: new,",
        "A round of measuring that nobody takes part in loses the means.",
        ("centred",),
    ),
    Fault(
        "the_clients_own_mask",
        "zofl_jax/configuration/phases.py",
        "if public is not None:",
        "if public is None:",
        "A mask said to be from public data is from the clients'.",
        ("mask_data",),
    ),
    # Precision.
    Fault(
        "control_variates_of_half_precision",
        "zofl_jax/algorithms/scaffold.py",
        "jax.tree.map(jnp.zeros_like, precision.wide(params))",
        "jax.tree.map(jnp.zeros_like, params)",
        "SCAFFOLD's control variates of a bfloat16 model stand still in bfloat16.",
        ("precision",),
    ),
    Fault(
        "adapters_rounded_away",
        "zofl_jax/models/lora.py",
        "merged[name] = params[name] + term",
        "merged[name] = (params[name] + term).astype(params[name].dtype)",
        "An exported bfloat16 model lacks what its adapters learnt.",
        ("precision",),
    ),
    # Rounds.
    Fault(
        "round_key_ahead",
        "zofl_jax/engine/rounds.py",
        "(keys.round_key(root.shared, r), state), (before, batches, own_keys)",
        "(keys.round_key(root.shared, r + 1), state), (before, batches, own_keys)",
        "Clients measure along the next round's directions, the server steps along this one's.",
        ("rounds",),
    ),
    Fault(
        "own_key_from_batches",
        "zofl_jax/engine/rounds.py",
        "keys.own_key(root.own, r, c)",
        "keys.own_key(root.batches, r, c)",
        "A client's private noise comes from the key of its batches.",
        ("rounds",),
    ),
    Fault(
        "memory_of_a_lost_round",
        "zofl_jax/engine/rounds.py",
        "_where_clients(keeps.remembered(received) & healthy, results.memory, before)",
        "_where_clients(keeps.remembered(received), results.memory, before)",
        "Clients remember a round that was not applied: theirs is not the last good state.",
        ("rounds",),
    ),
    Fault(
        "nan_accepted",
        "zofl_jax/engine/rounds.py",
        "jnp.all(jnp.abs(flat) <= jnp.asarray(bound, u.dtype), axis=1)",
        "~jnp.any(jnp.abs(flat) > jnp.asarray(bound, u.dtype), axis=1)",
        "A message of NaN compares as small and is accepted.",
        ("conditions",),
    ),
    Fault(
        "weights_of_other_clients",
        "zofl_jax/engine/rounds.py",
        "train.offsets[cohort + 1] - train.offsets[cohort]",
        "jnp.diff(train.offsets)[: len(cohort)]",
        "Means are weighted by the examples of the first clients instead of the cohort's.",
        ("rounds",),
    ),
    Fault(
        "replay_repeats_a_piece",
        "zofl_jax/engine/simulator.py",
        "lambda b, piece=piece: b[piece], broadcasts",
        "lambda b, piece=piece: b[: len(seeds[piece])], broadcasts",
        "A replay longer than one dispatch takes the first dispatch's rounds again and again.",
        ("replay",),
    ),
    # Scalars and directions.
    Fault(
        "central_over_mu",
        "zofl_jax/directions/estimators.py",
        "(plus - minus) / (2 * mu)",
        "(plus - minus) / mu",
        "Central differences are twice the derivative.",
        ("estimators",),
    ),
    Fault(
        "base_loss_perturbed",
        "zofl_jax/directions/estimators.py",
        "scales = jnp.where(order < 0, 0.0, mu)[:, None]",
        "scales = jnp.where(order <= 0, 0.0, mu)[:, None]",
        "Where models are evaluated together, the first direction is measured at no distance.",
        ("low_rank",),
    ),
    Fault(
        "last_direction_of_a_part",
        "zofl_jax/directions/estimators.py",
        "jnp.minimum(jnp.arange(chunks * together), count - 1)",
        "jnp.minimum(jnp.arange(chunks * together), count - 2)",
        "Evaluated in parts, the last direction gets the loss of the one before.",
        ("low_rank",),
    ),
    Fault(
        "sum_for_mean",
        "zofl_jax/directions/estimators.py",
        "perturbation.accumulate(direction_keys, params, scalars / num_perturbations)",
        "perturbation.accumulate(direction_keys, params, scalars)",
        "The direction is a sum over P directions instead of their mean.",
        ("estimators",),
    ),
    Fault(
        "sphere_scale",
        "zofl_jax/directions/perturbations.py",
        "factor = math.sqrt(size) / jnp.sqrt(square)",
        "factor = math.sqrt(len(jax.tree.leaves(params)) * size) / jnp.sqrt(square)",
        "The sphere's radius grows with the number of leaves.",
        ("perturbations",),
    ),
    Fault(
        "rank_for_its_root",
        "zofl_jax/directions/perturbations.py",
        "jnp.repeat(scalars / math.sqrt(rank), rank)",
        "jnp.repeat(scalars / rank, rank)",
        "Low-rank directions are summed with 1/r where they are measured with 1/√r.",
        ("hiso", "low_rank"),
    ),
    Fault(
        "low_rank_inner",
        "zofl_jax/directions/sums.py",
        "jnp.sum(projected * self.a) / math.sqrt(self.a.shape[-1])",
        "jnp.sum(projected * self.a)",
        "Exact derivatives along low-rank directions lack the factor 1/√r.",
        ("structured",),
    ),
    # Sums that are not formed.
    Fault(
        "scan_order",
        "zofl_jax/directions/structured.py",
        "[*consts, *carry, *whole]",
        "[*carry, *consts, *whole]",
        "The body of a scan gets its carry where its constants belong.",
        ("structured",),
    ),
    Fault(
        "wide_term_dropped",
        "zofl_jax/directions/structured.py",
        "for low, outer in wide:",
        "for low, outer in wide[1:]:",
        "A product that can't stand side by side with its matrix loses a term of many columns.",
        ("structured",),
    ),
    Fault(
        "reshape_mixes_sides",
        "zofl_jax/directions/structured.py",
        "kinds = set(sides[i : i + len(run_old)])",
        "kinds = set(sides[i : i + 1])",
        "A reshape that merges axes of both factors is taken for one of a single factor.",
        ("structured",),
    ),
    Fault(
        "step_behind_in_common",
        "zofl_jax/algorithms/decomfl.py",
        "optimizer, model, (k - 1) * num_perturbations, scalars / num_perturbations",
        "optimizer, model, (k - 1), scalars / num_perturbations",
        "Clients' coefficients overwrite those of the local step before.",
        ("low_rank",),
    ),
    # Keys.
    Fault(
        "directions_of_a_step_again",
        "zofl_jax/keys.py",
        "direction_keys(step_key(key, k), num_perturbations)",
        "direction_keys(step_key(key, 0 * k), num_perturbations)",
        "All local steps of a round in common have the same directions.",
        ("low_rank",),
    ),
    Fault(
        "own_key_every_round",
        "zofl_jax/keys.py",
        "jax.random.fold_in(jax.random.fold_in(own, round_index), client)",
        "jax.random.fold_in(own, client)",
        "A client's private noise is the same in all rounds, and cancels in differences.",
        ("keys",),
    ),
    Fault(
        "batches_of_a_step_again",
        "zofl_jax/data/batches.py",
        "sampling.subset(keys.step_key(key, step), count, batch_size)",
        "sampling.subset(keys.step_key(key, 0 * step), count, batch_size)",
        "All local steps of a round see the same batch.",
        ("batches",),
    ),
    # The ledger.
    Fault(
        "catch_up_from_its_last_round",
        "zofl_jax/engine/ledger.py",
        "self._held[members] = now + (sizes.sync is None)",
        "self._held[members] = now",
        "A client is sent the broadcast of its last round a second time.",
        ("ledger",),
    ),
    Fault(
        "replay_without_seeds",
        "zofl_jax/engine/ledger.py",
        "sent_until_now + sizes.seed + sizes.broadcast",
        "sent_until_now + sizes.broadcast",
        "Seeds of missed rounds are not counted.",
        ("ledger",),
    ),
    Fault(
        "first_sync_twice",
        "zofl_jax/engine/ledger.py",
        "self._cheapest(held, now, sizes.params if new else 0, points)",
        "self._cheapest(held, now, sizes.params if held <= 1 else 0, points)",
        "A client that was last there in round 0 is sent the initial params again.",
        ("ledger",),
    ),
    # Logs, replay and resume.
    Fault(
        "fingerprint_of_another_round",
        "zofl_jax/runs/recording.py",
        "run.log.metrics().get(int(state.round), {}).get(FINGERPRINT)",
        "run.log.metrics().get(int(state.round) - 1, {}).get(FINGERPRINT)",
        "The checksum is looked up where there is none, so a replay with other bits passes.",
        ("recording",),
    ),
    Fault(
        "a_round_too_many_kept",
        "zofl_jax/runs/recording.py",
        "run.log.truncate_after(done - 1)",
        "run.log.truncate_after(done)",
        "A resume keeps the row of the round that is run again.",
        ("recording",),
    ),
    Fault(
        "rejected_a_round_early",
        "zofl_jax/runs/recording.py",
        "trace.first_round + i + 1: {REJECTED: float(count)}",
        "trace.first_round + i: {REJECTED: float(count)}",
        "Rejected messages are logged with the state before their round.",
        ("conditions",),
    ),
    Fault(
        "row_checksum_ignored",
        "zofl_jax/runs/run_repair.py",
        "sound = run_log.checksum(values) == crc",
        "sound = crc is not None",
        "A row is trusted whose checksum is wrong.",
        ("run_log",),
    ),
    Fault(
        "salvage_over_a_gap",
        "zofl_jax/runs/run_repair.py",
        'if table == "rounds" and not (sound and values[0] == index):\n                return\n',
        'if table == "rounds" and not (sound and values[0] >= index):\n                return\n',
        "A damaged log is salvaged beyond a missing round, and its replay is of another run.",
        ("run_log",),
    ),
    Fault(
        "snapshot_of_the_start_deleted",
        "zofl_jax/runs/snapshots.py",
        "wanted = {0, *[r for r in rounds if r <= rounds_done][-keep:]}",
        "wanted = {*[r for r in rounds if r <= rounds_done][-keep:]}",
        "The snapshot of round 0, from which every round can be replayed, is deleted.",
        ("runs",),
    ),
    # Privacy.
    Fault(
        "clip_after_noise",
        "zofl_jax/conditions/privacy.py",
        "clipped = aggregation.clip_norm(result.upload, clip)\n"
        "        return result._replace(upload=_with_noise(noisy, clipped, deviation))",
        "noised = _with_noise(noisy, result.upload, deviation)\n"
        "        return result._replace(upload=aggregation.clip_norm(noised, clip))",
        "Uploads are clipped after the noise, which is private by no theorem.",
        ("privacy",),
    ),
    Fault(
        "noise_without_the_clip",
        "zofl_jax/conditions/privacy.py",
        "deviation = noise_multiplier * clip / math.sqrt(clients_per_round)",
        "deviation = noise_multiplier / math.sqrt(clients_per_round)",
        "The noise doesn't scale with the clipping norm.",
        ("privacy",),
    ),
    Fault(
        "sampling_rate_of_those_heard",
        "zofl_jax/conditions/accounting.py",
        "parts.append((effective, clients_per_round, num_clients, rounds))",
        "parts.append((effective, count, num_clients, rounds))",
        "ε counts as sampled those heard, who are fewer than those asked.",
        ("privacy",),
    ),
    Fault(
        "noise_of_a_step_again",
        "zofl_jax/conditions/privacy.py",
        "_Step(batches, jax.random.split(noise, algorithm.local_steps))",
        "_Step(batches, jnp.broadcast_to(noise, (algorithm.local_steps,)))",
        "All local steps of a client have the same noise.",
        ("privacy",),
    ),
    # What the server makes of uploads, and what they are made of.
    Fault(
        "mean_ignores_weights",
        "zofl_jax/conditions/aggregation.py",
        "shares = weights.astype(wide) / jnp.where(total > 0, total, 1)",
        "shares = (weights > 0).astype(wide) / jnp.maximum(jnp.sum(weights > 0), 1).astype(wide)",
        "The weighted mean is uniform over those who are there.",
        ("aggregation",),
    ),
    Fault(
        "trimmed_on_one_side",
        "zofl_jax/conditions/aggregation.py",
        "kept = ((rank >= dropped) & (rank < count - dropped)).astype(jnp.float32)",
        "kept = ((rank >= dropped) & (rank < count)).astype(jnp.float32)",
        "The trimmed mean keeps the largest numbers.",
        ("aggregation",),
    ),
    Fault(
        "error_feedback_dropped",
        "zofl_jax/conditions/compression.py",
        "whole = jax.tree.map(lambda u, r: u + r.astype(u.dtype), result.upload, memory.residual)",
        "whole = jax.tree.map(lambda u, r: u + 0 * r.astype(u.dtype), result.upload, "
        "memory.residual)",
        "What an upload lost is kept, but not added to the next one.",
        ("first_order",),
    ),
    Fault(
        "cohort_with_repeats",
        "zofl_jax/sampling.py",
        "jnp.where(jnp.any(chosen == candidate), otherwise, candidate)",
        "jnp.where(jnp.any(chosen == candidate), candidate, candidate)",
        "A client may be twice in a cohort.",
        ("sampling",),
    ),
    Fault(
        "absent_inform_the_attack",
        "zofl_jax/conditions/attacks.py",
        "return present & ~malicious",
        "return ~malicious",
        "Attackers know what absent clients would have sent.",
        ("attacks",),
    ),
    Fault(
        "late_along_new_directions",
        "zofl_jax/conditions/staleness.py",
        "after = algorithm.server(before, state, late)",
        "after = algorithm.server(key, state, late)",
        "Late scalars move the model along the directions of the round they arrive in.",
        ("conditions",),
    ),
    Fault(
        "late_uploads_lost_silently",
        "zofl_jax/engine/carried.py",
        "return LateAreKept() if algorithm.late_uploads else LateAreLost()",
        "return LateAreLost()",
        "Half of the cohort counts as late, with an algorithm that takes late uploads.",
        ("fitting",),
    ),
    Fault(
        "a_later_phase_unchecked",
        "zofl_jax/engine/fitting.py",
        "    for phase in phases:\n        _check_expectations(phase.algorithm, setting)",
        "    _check_expectations(phases[0].algorithm, setting)",
        "A phase that was made for another cohort reports a false ε.",
        ("fitting",),
    ),
    # Methods.
    Fault(
        "hiso_floor",
        "zofl_jax/algorithms/hiso.py",
        "(1 - nu) * h + nu * (square + epsilon)",
        "(1 - nu) * h + nu * square + epsilon",
        "The curvature's floor is added in full in every step, not its share ν.",
        ("hiso",),
    ),
    Fault(
        "fedkseed_repeated_seed",
        "zofl_jax/algorithms/fedkseed.py",
        "SeedPool(accumulators.at[seeds].add(parts), amplitudes, counts)",
        "SeedPool(accumulators.at[seeds].set(accumulators[seeds] + parts), amplitudes, counts)",
        "A seed drawn twice in a round counts once in its accumulator.",
        ("scalar_methods",),
    ),
    Fault(
        "scaffold_share",
        "zofl_jax/algorithms/scaffold.py",
        "lambda c, d: c + share * d",
        "lambda c, d: c + d",
        "The server's control moves as if the cohort were the population.",
        ("conditions",),
    ),
    Fault(
        "feedsign_tie",
        "zofl_jax/algorithms/feedsign.py",
        "compression.pack((votes < 0).astype(jnp.uint8), 1)",
        "compression.pack((votes <= 0).astype(jnp.uint8), 1)",
        "A tie of the votes is negative.",
        ("scalar_methods",),
    ),
    # Data and models.
    Fault(
        "shards_by_unshuffled_labels",
        "zofl_jax/data/partition.py",
        'shuffled[np.argsort(labels[shuffled], kind="stable")]',
        'shuffled[np.argsort(labels, kind="stable")]',
        "Shards hold examples of any label.",
        ("partition",),
    ),
    Fault(
        "rope_angle",
        "zofl_jax/models/blocks.py",
        "/ np.float32(config.head_dim)",
        "/ np.float32(config.head_dim // 2)",
        "Pairs of features turn by the angles of a head half as wide.",
        ("transformer",),
    ),
    Fault(
        "mask_off_by_one",
        "zofl_jax/models/transformer.py",
        "np.tril(np.ones((mask.shape[1],) * 2, bool))",
        "np.tril(np.ones((mask.shape[1],) * 2, bool), 1)",
        "A token attends to the one that it predicts.",
        ("transformer",),
    ),
    Fault(
        "decoding_positions_count_padding",
        "zofl_jax/models/generation.py",
        "positions = mask.sum(axis=1, keepdims=True) + state.step - 1",
        "positions = jnp.full((batch, 1), length) + state.step - 1",
        "A written token's position counts the padding before its prompt.",
        ("transformer",),
    ),
    Fault(
        "bos_never_added",
        "zofl_jax/models/tokenizers.py",
        "return [*self.prefix, *ids] if special else ids",
        "return ids",
        "Prompts lack the token that starts a text.",
        ("tokenizers",),
    ),
    Fault(
        "padding_attended",
        "zofl_jax/tasks/encoding.py",
        "mask = jnp.arange(size) >= size - length[:, None]",
        "mask = jnp.arange(size) >= size - 1 - length[:, None]",
        "The last token of the padding counts as one of the prompt.",
        ("encoding",),
    ),
    Fault(
        "pool_of_overlapping_windows",
        "zofl_jax/models/cnn.py",
        "jax.lax.max, window, window,",
        "jax.lax.max, (1, 3, 2, 1), window,",
        "On accelerators a pool looks at a row of the next window.",
        ("accelerator_forms",),
    ),
    Fault(
        "search_stops_between",
        "experiments/tuning.py",
        "elif step == 4 or not higher.good:",
        "elif not higher.good:",
        "Where four times the rate is good and no better, twice the rate is not tried.",
        ("tuning",),
    ),
)


def planted(text: str, fault: Fault) -> str:
    """Returns a file's text with the fault in it.

    Raises:
      ValueError: if the text to be replaced isn't there once.

    >>> planted("a = b + 1", Fault("sign", "a.py", "b + 1", "b - 1", "a is too small.", ()))
    'a = b - 1'
    """
    count = text.count(fault.old)
    if count != 1:
        raise ValueError(
            f"fault {fault.name} is stale: its text occurs {count} times in {fault.file}, not "
            f"once; write it anew for the code as it is: {fault.old!r}"
        )
    return text.replace(fault.old, fault.new)


def run_tests(folder: Path, tests: Iterable[str], cache: Path) -> tuple[int | None, str, float]:
    """Runs files of tests, or single ones, up to the first failure.

    Returns pytest's exit status (None without an answer), its output, and seconds of CPU.
    """
    short_run = ["-m", "not thorough"]  # `make test`
    options = ["-x", "-q", "-n0", *short_run, "-rfE", "--tb=short", "-o", f"cache_dir={cache}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        status, output = None, f"no answer in {TIMEOUT} s"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return status, output, spent


def failed_test(output: str) -> str | None:
    """Returns the first test that pytest's summary names as failed or in error.

    >>> failed_test("F\\nFAILED tests/test_a.py::test_b[c - d] - assert 1 == 2\\n1 failed")
    'tests/test_a.py::test_b[c - d]'
    """
    found = re.search(r"^(?:FAILED|ERROR) (\S+?::[^\s\[]+(?:\[.*?\])?)(?: - |$)", output, re.M)
    return found and found[1]


def copy_tracked(repo: Path, folder: Path) -> None:
    """Copies the files of a checkout that git tracks, as they are now."""
    listed = subprocess.run(
        ["git", "-C", str(repo), "ls-files", "-z"], check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (repo / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repo / name, folder / name)


def chosen(names: Sequence[str] | None) -> list[Fault]:
    """Returns the faults of these names, all without names.

    Raises:
      ValueError: for a name that no fault has.
    """
    known = {fault.name: fault for fault in FAULTS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"there is no fault {name!r}: choose from {', '.join(known)}")
    return [known[name] for name in names or known]


def check_texts(repo: Path, faults: Sequence[Fault]) -> None:
    """Raises ValueError, a line for each fault that can't be planted in the files of `repo`."""
    stale = []
    for fault in faults:
        try:
            planted((repo / fault.file).read_text(), fault)
        except (OSError, ValueError) as error:
            stale.append(str(error))
    if stale:
        raise ValueError("\n".join(stale))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults to plant, all by default")
    parser.add_argument("--repo", type=Path, default=Path(__file__).parent.parent, help="checkout")
    parser.add_argument(
        "--cache", type=Path, help="pytest's cache folder, in the checkout's own by default"
    )
    given = parser.parse_args(arguments)
    repo = given.repo.resolve()
    cache = (given.cache or repo / ".pytest_cache" / "planted_faults").resolve()
    try:
        faults = chosen(given.only)
        check_texts(repo, faults)
    except ValueError as error:
        print(error)
        return 1

    def tell(verdict: str, name: str, spent: float, rest: str) -> None:
        print(f"{verdict:9} {name:32} {spent:6.1f} s  {rest}", flush=True)

    began, total = time.perf_counter(), 0.0
    found_by: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="planted_faults") as temporary:
        unchanged, changed = Path(temporary) / "unchanged", Path(temporary) / "changed"
        copy_tracked(repo, unchanged)
        for fault in faults:
            shutil.copytree(unchanged, changed)
            file = changed / fault.file
            file.write_text(planted(file.read_text(), fault))
            files = [f"tests/test_{name}.py" for name in fault.tests]
            status, output, spent = run_tests(changed, files, cache)
            shutil.rmtree(changed)
            total += spent
            test = failed_test(output)
            if status == 1 and test is not None:
                found_by[fault.name] = test
                tell("found", fault.name, spent, test)
            elif status == 0:
                tell("NOT FOUND", fault.name, spent, f"in {', '.join(files)}: {fault.breaks}")
            else:
                tell("BROKEN", fault.name, spent, f"pytest ended with {status}: {output[-2000:]}")
        if found_by:
            tests = sorted(set(found_by.values()))
            status, output, spent = run_tests(unchanged, tests, cache)
            total += spent
            if status != 0:
                print(f"{output}\nthe unchanged tree fails a test that is said to find a fault")
                return 1
            tell("passes", "(unchanged tree)", spent, f"the {len(tests)} tests that found them")
    print(
        f"{len(found_by)} of {len(faults)} faults found, {total:.0f} s of CPU, "
        f"{time.perf_counter() - began:.0f} s in all"
    )
    return 0 if len(found_by) == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
