"""Recovery: student, losses, teacher, loop, states and the verb, each against a slow or a plain form of itself."""

from __future__ import annotations

import gc
import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from tiny import CASES, make_checkpoint
from typer.testing import CliRunner

import cli.trained
import cli.training_lessons
from cli.app import Verb, Verbs
from cli.recover import recover
from compress.checkpoint import open_checkpoint
from compress.decoder import compute_logits, make_frame, run_layer
from compress.errors import UserError
from compress.recover import state
from compress.recover.data import Batch
from compress.recover.loop import (
    Diverged,
    History,
    LoopOptions,
    Trainer,
    add_gradients,
    measure_loss,
    train,
    watch_loss,
)
from compress.recover.lora import LoraOptions
from compress.recover.losses import (
    CE,
    KL,
    MIX,
    Objective,
    Top,
    cross_entropy,
    differentiate_rows,
    forward_kl,
    match_error,
    score_tokens,
    tail_kl,
)
from compress.recover.merge import average_checkpoints, merge_step
from compress.recover.model import Frozen, Student, StudentOptions, lay_out, restart_positions
from compress.recover.optimizer import AdamOptions, AdamW, Average
from compress.recover.schedule import COSINE, WSD, Schedule, rate_factor
from compress.recover.state import Curve, find_state, list_states, load_state, open_work, read_curve, save_state
from compress.recover.teacher import (
    BUDGET_BYTES,
    CachedTeacher,
    NoTeacher,
    OnlineTeacher,
    check_matches,
    check_vocabulary,
    choose_form,
    fill_cache,
    open_cache,
    pack_scores,
    plan_cache,
    select_rows,
    shard_path,
    unpack_scores,
)
from compress.report import DIFFERENT, Proof
from compress.weights import embed_rows, read_head, read_layer, read_spec

ROOT = Path(__file__).resolve().parents[1]
EXACT = StudentOptions(dtype=torch.float64)
# Layers of different sizes, as an uneven plan leaves them.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
UNEVEN = {"1": {"intermediate_size": 24, **HEADS}, "2": {"intermediate_size": 8}}


def make_batch(seed=0, rows=2, cuts=((0, 5, 14), (0, 9, 9)), length=20):
    """Rows of three documents and padding; the first tokens of documents and some others do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (rows, length), generator=generator)
    documents = torch.zeros(rows, length, dtype=torch.int64)
    weights = (torch.rand(rows, length, generator=generator) > 0.2).float()
    for row in range(rows):
        for cut in cuts[row % len(cuts)][1:]:
            documents[row, cut:] += 1
            weights[row, cut] = 0
    documents[:, -3:] = 9
    weights[:, 0] = weights[:, -3:] = 0
    return Batch(ids, weights, documents)


class Stream:
    """An endless stream of made batches."""

    def batches(self, start=0):
        while True:
            yield make_batch(start)
            start += 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a function from a case to an open tiny checkpoint and its spec."""
    made = {}

    def make(case, **changes):
        key = case + json.dumps(changes)
        if key not in made:
            made[key] = open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("tiny") / case, case, **changes))
        return made[key], read_spec(made[key])

    return make


def run_alone(checkpoint, spec, ids):
    """The last stream `[length, hidden]` of one document in a row of its own, layer by layer, in float64."""
    x = embed_rows(checkpoint, spec, ids[None], torch.float64)
    frame = make_frame(spec, 1, len(ids), dtype=torch.float64)
    for index, layer in enumerate(spec.layers):
        x = run_layer(spec, layer, read_layer(checkpoint, spec, index, torch.float64), x, frame)[0]
    return x[0]


def split_documents(batch):
    """Yield (row, slice) of each document, found token by token."""
    for row, documents in enumerate(batch.documents.tolist()):
        start = 0
        for place in range(1, len(documents) + 1):
            if place == len(documents) or documents[place] != documents[start]:
                yield row, slice(start, place)
                start = place


# The student


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_are_what_they_are_alone(case, tiny):
    checkpoint, spec = tiny(case)
    batch = make_batch()
    student = Student(checkpoint, spec, EXACT)
    stream, _ = student(batch.ids, batch.documents)
    head = read_head(checkpoint, spec, torch.float64)
    for row, span in split_documents(batch):
        alone = run_alone(checkpoint, spec, batch.ids[row, span])
        torch.testing.assert_close(stream[row, span], alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(student.logits(stream[row, span]), compute_logits(spec, head, alone))


def test_positions_restart_as_counted_one_by_one():
    documents = make_batch().documents
    slow = torch.zeros_like(documents)
    for row in range(documents.shape[0]):
        for place in range(1, documents.shape[1]):
            same = documents[row, place] == documents[row, place - 1]
            slow[row, place] = slow[row, place - 1] + 1 if same else 0
    assert torch.equal(restart_positions(documents), slow)


def test_rows_of_one_document_need_no_mask(tiny):
    _, spec = tiny("llama")
    ids = make_batch().ids
    layout = lay_out(spec, ids, torch.full_like(ids, 4))
    assert layout.places is None
    assert layout.frame.tables[spec.layers[0].rope][0].shape[0] == 1


@pytest.mark.parametrize("case", ["llama", "gemma2", "phi3"])
def test_uneven_student_writes_what_it_read(case, tiny):
    checkpoint, spec = tiny(case, **({"per_layer_config": UNEVEN} if case == "llama" else {}))
    written = dict(Student(checkpoint, spec).stored())
    assert set(written) >= set(checkpoint.tensors)
    for name, tensor in checkpoint.read(checkpoint.tensors).items():
        assert torch.equal(written[name], tensor), name


def test_student_without_its_absorbed_norms_is_trained_and_written(tiny):
    checkpoint, spec = tiny("glm4", per_layer_config={"1": {"absorbed_norms": ["attn_out", "mlp_out"]}, "2": HEADS})
    student, batch = Student(checkpoint, spec, EXACT), make_batch()
    stream, _ = student(batch.ids, batch.documents)
    for row, span in split_documents(batch):
        torch.testing.assert_close(stream[row, span], run_alone(checkpoint, spec, batch.ids[row, span]))
    assert "attn_out" not in student.layers[1].weights
    assert_close_all(take_gradients(student, Objective(CE), NoTeacher()), plain_gradients(student, Objective(CE), None))
    assert set(dict(student.stored())) == set(checkpoint.tensors) | {spec.names["head"]}


def test_frozen_model_is_the_student_from_memory_and_from_disk(tiny):
    checkpoint, spec = tiny("glm4", per_layer_config=UNEVEN)
    batch = make_batch()
    expected, tapped = Student(checkpoint, spec)(batch.ids, batch.documents, taps=[1])
    for resident in (True, False):
        streams, taps = Frozen(checkpoint, spec, resident).streams([(batch.ids, batch.documents)] * 2, [1])
        assert torch.equal(streams[1], expected)
        assert torch.equal(taps[1][0], tapped[1])


def test_tied_embedding_is_one_parameter(tiny):
    checkpoint, spec = tiny("llama-tied")
    student = Student(checkpoint, spec)
    assert [name for name in student.trained() if name.startswith("ends.")] == ["ends.embed", "ends.final_norm"]
    gradients = take_gradients(student, Objective(CE), NoTeacher())
    # Both uses count: by the plain loss, written out.
    assert_close_all(gradients, plain_gradients(student, Objective(CE), None))


# Losses


def random_logits(seed, tokens=7, vocab=11):
    return 3 * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_tail_kl(logits, top, weights):
    """Token by token: probabilities of k tokens and the sum over all others, in both models."""
    total = 0.0
    for token in range(len(logits)):
        probs, chosen = logits[token].softmax(-1), top.ids[token].tolist()
        others = sum(probs[place] for place in range(logits.shape[1]) if place not in chosen)
        own = torch.stack([*(probs[place] for place in chosen), others])
        teacher = torch.cat((top.log_probs[token], top.tail[token : token + 1])).exp()
        total = total + weights[token] * (teacher * (teacher.log() - own.log())).sum()
    return total


def cut_top(logits, k):
    """The exact top-k buckets of a teacher's logits."""
    log_probs = logits.log_softmax(-1)
    values, ids = log_probs.topk(k)
    return Top(ids, values, torch.log1p(-values.exp().sum(-1)))


def plain_kl(logits, teacher, weights):
    log_probs = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    return (log_probs.sum(-1) * weights).sum()


@torch.enable_grad()
def slope(loss, logits):
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("name", ["kl", "tail", "ce"])
def test_losses_and_their_gradients_equal_the_plain_forms(name):
    logits, teacher = random_logits(0), random_logits(1)
    weights, labels = torch.rand(7, dtype=torch.float64), torch.arange(7)
    top = cut_top(teacher, 4)
    fast, slow = {
        "kl": (lambda z: forward_kl(z, teacher, weights), lambda z: plain_kl(z, teacher, weights)),
        "tail": (lambda z: tail_kl(z, top, weights), lambda z: slow_tail_kl(z, top, weights)),
        "ce": (
            lambda z: cross_entropy(z, labels, weights),
            lambda z: -sum(weights[i] * z[i].log_softmax(-1)[i] for i in range(7)),
        ),
    }[name]
    for got, wanted in zip(slope(fast, logits), slope(slow, logits), strict=True):
        torch.testing.assert_close(got, wanted)
    with torch.enable_grad():
        assert torch.autograd.gradcheck(fast, logits.clone().requires_grad_())


def test_tail_kl_is_zero_at_the_teacher_and_never_above_the_full_divergence():
    teacher, weights = random_logits(1), torch.ones(7, dtype=torch.float64)
    for k in (1, 4, 10):
        top = cut_top(teacher, k)
        assert abs(float(tail_kl(teacher, top, weights))) < 1e-12
        assert slope(lambda z, top=top: tail_kl(z, top, weights), teacher)[1].abs().max() < 1e-12
        assert 0 < tail_kl(random_logits(2), top, weights) <= forward_kl(random_logits(2), teacher, weights)


def test_empty_tail_adds_nothing():
    teacher = torch.full((1, 5), -1e3, dtype=torch.float64)
    teacher[0, 2] = 0.0
    top = unpack_scores(pack_scores(teacher, choose_form(5, 14)))
    value, gradient = slope(lambda z: tail_kl(z, top, torch.ones(1).double()), random_logits(3, 1, 5))
    torch.testing.assert_close(value, -random_logits(3, 1, 5).log_softmax(-1)[0, 2])
    assert bool(gradient.isfinite().all())


def test_mix_is_the_shares_of_both_and_needs_a_teacher():
    logits, teacher, labels = random_logits(0), random_logits(1), torch.arange(7)
    weights = torch.rand(7, dtype=torch.float64)
    mixed = score_tokens(Objective(MIX, 0.3), logits, labels, weights, teacher)
    both = 0.3 * forward_kl(logits, teacher, weights) + 0.7 * cross_entropy(logits, labels, weights)
    torch.testing.assert_close(mixed, both)
    with pytest.raises(UserError, match="needs a teacher"):
        score_tokens(Objective(KL), logits, labels, weights, None)
    with pytest.raises(UserError, match="--alpha 2"):
        Objective(MIX, 2.0)
    with pytest.raises(UserError, match="--loss huber"):
        Objective("huber")


def test_pieces_give_the_gradient_of_the_whole():
    rows, weights = random_logits(4, 10, 6), torch.rand(10, dtype=torch.float64)
    head, teacher = random_logits(5, 11, 6), random_logits(6, 10, 11)
    with torch.enable_grad():
        one, two = (head.clone().requires_grad_() for _ in range(2))
        leaf = rows.clone().requires_grad_()
        whole = forward_kl(leaf @ one.T, teacher, weights)
        whole.backward()
        total, gradient = differentiate_rows(
            lambda x: x @ two.T, rows, lambda z, span: forward_kl(z, teacher[span], weights[span]), 3
        )
    assert total == pytest.approx(float(whole))
    torch.testing.assert_close(gradient, leaf.grad)
    torch.testing.assert_close(two.grad, one.grad)


def test_match_error_is_relative():
    student, teacher, weights = random_logits(0), random_logits(1), torch.rand(7, dtype=torch.float64)
    energy = [float(row @ row) / len(row) for row in teacher]
    mean = sum(energy) / len(energy)
    slow = sum(
        float(w) * float((s - t) @ (s - t)) / len(t) / (e + 1e-3 * mean)
        for s, t, w, e in zip(student, teacher, weights, energy, strict=True)
    )
    assert float(match_error(student, teacher, weights)) == pytest.approx(slow)


# Gradients of a step


def take_gradients(student, objective, teaching, batches=None, accumulate=1, **options):
    """Gradients of one step by name, as the loop computes them."""
    trainer = Trainer(student, objective, LoopOptions(1e-3, Schedule(5), accumulate, **options))
    add_gradients(trainer, teaching, batches or Stream().batches())
    found = {name: tensor.grad.clone() for name, tensor in student.trained().items()}
    trainer.optimizer.clear_gradients()
    return found


def plain_gradients(student, objective, teacher, count=1):
    """The same by one backward pass of the plain loss over all logits at once."""
    total, weight = 0.0, 0.0
    with torch.enable_grad():
        for batch in islice(Stream().batches(), count):
            stream, tapped = student(batch.ids, batch.documents, [own for own, _ in objective.matches])
            logits, targets, weights = student.logits(stream)[:, :-1], batch.ids[:, 1:], batch.weights[:, 1:]
            share = {KL: 1.0, CE: 0.0, MIX: objective.alpha}[objective.kind]
            losses = (1 - share) * F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            if teacher is not None:
                streams, taps = teacher(batch.ids, batch.documents, [other for _, other in objective.matches])
                wanted = teacher.logits(streams)[:, :-1].detach()
                kl = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True)
                losses = losses + share * kl.sum(-1)
                counted = weights > 0
                for own, other in objective.matches:
                    pair = (tapped[own][:, :-1][counted], taps[other][:, :-1][counted].detach())
                    total = total + match_error(*pair, weights[counted])
            total = total + (losses * weights).sum()
            weight += float(weights.sum())
        names = student.trained()
        gradients = torch.autograd.grad(total / weight, list(names.values()))
    return dict(zip(names, gradients, strict=True))


def assert_close_all(got, wanted, **options):
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **options)


@pytest.mark.parametrize("case", ["llama-biases", "gemma2", "glm4", "olmo2", "granite", "phi3"])
def test_gradients_of_a_step_are_those_of_the_plain_loss(case, tiny):
    checkpoint, spec = tiny(case)
    teacher = Student(*tiny(case, rms_norm_eps=0.1), EXACT)  # other numbers, the same widths
    student = Student(checkpoint, spec, EXACT)
    objective = Objective(MIX, 0.7, matches=((1, 1), (3, 2)))

    model = Frozen(*tiny(case, rms_norm_eps=0.1), resident=True, dtype=torch.float64)
    got = take_gradients(student, objective, OnlineTeacher(model, [1, 2]), accumulate=2)
    assert_close_all(got, plain_gradients(student, objective, teacher, 2))
    again = Student(checkpoint, spec, StudentOptions(run_again=True, dtype=torch.float64))
    assert_close_all(take_gradients(again, objective, OnlineTeacher(model, [1, 2]), accumulate=2), got)


def test_accumulated_batches_are_one_large_batch(tiny):
    checkpoint, spec = tiny("llama")
    student = Student(checkpoint, spec, EXACT)
    few = [make_batch(0), make_batch(1)]
    large = Batch(*(torch.cat([getattr(one, name) for one in few]) for name in ("ids", "weights", "documents")))
    got = take_gradients(student, Objective(CE), NoTeacher(), iter(few), accumulate=2)
    assert_close_all(got, take_gradients(student, Objective(CE), NoTeacher(), iter([large])))


def test_bf16_gradients_are_near_the_exact_ones(tiny):
    checkpoint, spec = tiny("qwen3")
    teaching = OnlineTeacher(Frozen(*tiny("qwen3", rms_norm_eps=0.1), True))
    for again in (False, True):
        student = Student(checkpoint, spec, StudentOptions(run_again=again))
        exact = take_gradients(student, Objective(KL), teaching)
        rough = take_gradients(student, Objective(KL), teaching, bf16=True)
        for name, tensor in exact.items():
            assert rough[name].dtype == torch.float32
            assert float((rough[name] - tensor).norm() / tensor.norm()) < 0.1, name
        assert any(not torch.equal(rough[name], exact[name]) for name in exact)


def test_bf16_losses_are_summed_exactly(tiny):
    student, model = Student(*tiny("qwen3")), Frozen(*tiny("qwen3", rms_norm_eps=0.1), True)
    for objective in (Objective(KL), Objective(CE), Objective(KL, matches=((1, 1),))):
        trainer = Trainer(student, objective, LoopOptions(1e-3, Schedule(5), bf16=True))
        loss, _ = add_gradients(trainer, OnlineTeacher(model, [1]), iter([make_batch(0)]))
        total = loss * float(make_batch(0).weights[:, 1:].sum())
        # A sum that went through a product of matrices would have eight bits.
        assert abs(float(torch.tensor(total).bfloat16()) - total) > 1e-5 * total


# Optimiser and schedule


def test_adamw_equals_torch():
    generator = torch.Generator().manual_seed(0)
    names = {"matrix": (5, 3), "vector": (4,)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    own, other = ({name: torch.nn.Parameter(t.clone()) for name, t in start.items()} for _ in range(2))
    mine = AdamW(own, AdamOptions((0.9, 0.95), 1e-8, 0.1))
    groups = [{"params": [other["matrix"]], "weight_decay": 0.1}, {"params": [other["vector"]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(20):
        for group in reference.param_groups:
            group["lr"] = 0.01 / (step + 1)
        for name, shape in names.items():
            gradient = torch.randn(shape, generator=generator)
            own[name].grad, other[name].grad = gradient.clone(), gradient.clone()
        mine.step(0.01 / (step + 1))
        reference.step()
    for name in names:
        torch.testing.assert_close(own[name], other[name], rtol=1e-6, atol=1e-7)


def test_average_follows_by_its_share():
    weights = {"w": torch.nn.Parameter(torch.tensor([1.0, 2.0]))}
    average = Average(weights, 0.75)
    weights["w"].copy_(torch.tensor([5.0, 2.0]))
    average.update(weights)
    assert average.values["w"].tolist() == [2.0, 2.0]
    average.swap(weights)
    assert (weights["w"].tolist(), average.values["w"].tolist()) == ([2.0, 2.0], [5.0, 2.0])


def test_schedules_rise_hold_and_fall():
    cosine = [rate_factor(Schedule(100, COSINE, 10), step) for step in range(100)]
    assert cosine[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert cosine[10:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * k / 90)) for k in range(90)])
    wsd = [rate_factor(Schedule(100, WSD, 10, 0.0, 0.2), step) for step in range(100)]
    assert wsd[9:82] == [1.0] * 72 + [pytest.approx(1.0)]
    assert wsd[82:] == pytest.approx([1 - math.sqrt((k - 72) / 18) for k in range(72, 90)])
    for wrong in ({"kind": "linear"}, {"warmup": 100}):
        with pytest.raises(UserError):
            Schedule(100, **wrong)
    with pytest.raises(UserError, match="no step"):
        Schedule(0)


# Adapters


def test_adapters_change_nothing_at_first_and_merge_to_the_bit(tiny):
    checkpoint, spec = tiny("phi3", per_layer_config={})  # q, k, v and gate, up are stored fused
    student = Student(checkpoint, spec, StudentOptions(LoraOptions(2)))
    batch = make_batch()
    first, _ = student(batch.ids, batch.documents)
    assert torch.equal(first, Student(checkpoint, spec)(batch.ids, batch.documents)[0])
    assert all(".adapters." in name for name in student.trained())
    assert len(student.trained()) == 2 * 7 * len(spec.layers)
    trainer = Trainer(student, Objective(CE), LoopOptions(1e-2, Schedule(3)))
    for _ in train(trainer, NoTeacher(), Stream().batches()):
        pass
    written = dict(student.stored())
    changed = [name for name, info in checkpoint.tensors.items() if not same(written[name], checkpoint, name)]
    assert changed == [name for name, info in checkpoint.tensors.items() if len(info.shape) > 1 and ".layers." in name]
    after, _ = student(batch.ids, batch.documents)
    for place, layer in enumerate(student.layers):
        wanted = layer.weights["o"] + 2.0 * layer.adapters["o"].b @ layer.adapters["o"].a
        torch.testing.assert_close(written[spec.layers[place].names["o"]], wanted)
    # What was written, run by a student without adapters, is to the bit what was trained.
    plain = Student(checkpoint, spec)
    for place, layer in enumerate(plain.layers):
        for role, tensor in student.layers[place].collect().items():
            layer.weights[role].copy_(tensor)
    assert torch.equal(plain(batch.ids, batch.documents)[0], after)


def same(tensor, checkpoint, name):
    return torch.equal(tensor, checkpoint.read_one(name))


def test_adapter_gradients_are_those_of_the_product(tiny):
    checkpoint, spec = tiny("llama", per_layer_config=UNEVEN)
    student = Student(checkpoint, spec, StudentOptions(LoraOptions(2, roles=("q", "down")), dtype=torch.float64))
    for name, tensor in student.trained().items():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    got = take_gradients(student, Objective(CE), NoTeacher())
    assert_close_all(got, plain_gradients(student, Objective(CE), None))
    with pytest.raises(UserError, match="no projection"):
        LoraOptions(2, roles=("head",))
    with pytest.raises(UserError, match="--lora 0"):
        LoraOptions(0)


# The teacher's scores on disk


@pytest.mark.parametrize(("vocab", "k"), [(11, 10), (96, 13), (65536, 13), (65537, 10), (200_000, 10)])
def test_scores_keep_to_the_budget_and_come_back(vocab, k):
    form = choose_form(vocab)
    assert (form.k, form.wide) == (k, vocab > 65536)
    assert form.record.itemsize <= BUDGET_BYTES
    logits = random_logits(0, 5, vocab).float()
    records = pack_scores(logits, form)
    top, exact = unpack_scores(records), cut_top(logits.double(), k)
    assert torch.equal(top.ids, exact.ids)
    torch.testing.assert_close(top.log_probs.double(), exact.log_probs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(top.tail.double().exp(), exact.tail.exp(), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(torch.cat((top.log_probs, top.tail[:, None]), -1).exp().sum(-1), torch.ones(5))
    torch.testing.assert_close(torch.from_numpy(records["total"].copy()), logits.logsumexp(-1))
    with pytest.raises(UserError, match="9 bytes"):
        choose_form(vocab, 9)


def fill(folder, tiny, batches=7, key=None):
    model = Frozen(*tiny("glm4"))
    plan = plan_cache(key or {"teacher": "a", "data": "b"}, 96, batches, 2**16 // 3)
    open_cache(folder, plan)
    fill_cache(folder, plan, model, Stream().batches, lambda *step: None)
    return plan, model


def test_cached_scores_are_the_teachers(tiny, tmp_path):
    plan, model = fill(tmp_path, tiny)
    assert plan.per_shard == 3
    assert [path.name for path in sorted(tmp_path.glob("*.npy"))] == [f"shard-0000{n}.npy" for n in range(3)]
    cached, online = CachedTeacher(tmp_path, plan), OnlineTeacher(model)
    counted = 0
    for number in (0, 1, 6, 2, 5):
        batch = make_batch(number)
        rows = select_rows(batch)
        counted += len(rows.labels)
        logits, span = online.guide(number, batch).target(slice(None)), slice(2, 9)
        top, exact = cached.guide(number, batch).target(span), cut_top(logits[span].double(), plan.form.k)
        assert torch.equal(top.ids, exact.ids)
        torch.testing.assert_close(top.log_probs.double(), exact.log_probs, rtol=1e-3, atol=1e-3)
    stored = sum(len(np.load(shard_path(tmp_path, shard))) for shard in range(3))
    assert stored == sum(len(select_rows(make_batch(number)).labels) for number in range(7)) > counted


def test_batches_in_which_nothing_counts_have_no_scores(tiny, tmp_path):
    idle = make_batch(0)
    idle.weights.zero_()
    model, plan = Frozen(*tiny("glm4")), plan_cache({}, 96, 2, 40)
    open_cache(tmp_path, plan)
    fill_cache(tmp_path, plan, model, lambda start: iter([idle, idle][start:]), lambda *step: None)
    assert len(CachedTeacher(tmp_path, plan).guide(1, idle).target(slice(None)).ids) == 0


def test_stopped_scoring_goes_on_and_leaves_finished_shards(tiny, tmp_path):
    plan, model = fill(tmp_path, tiny)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shard_path(tmp_path, 1).unlink()
    untouched = shard_path(tmp_path, 0).stat().st_mtime_ns
    open_cache(tmp_path, plan)
    fill_cache(tmp_path, plan, model, Stream().batches, lambda *step: None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    assert shard_path(tmp_path, 0).stat().st_mtime_ns == untouched


def test_scores_of_another_run_are_refused(tiny, tmp_path):
    plan, _ = fill(tmp_path, tiny, batches=2)
    others = ({"teacher": "c", "data": "b"}, 2, "teacher"), ({"teacher": "a", "data": "d"}, 2, "data")
    for key, batches, word in (*others, (plan.key, 3, "settings")):
        with pytest.raises(UserError, match=f"its {word} differ"):
            open_cache(tmp_path, plan_cache(key, 96, batches, 2**16 // 3))
    with pytest.raises(UserError, match="other text"):
        CachedTeacher(tmp_path, plan).guide(0, make_batch(5))
    shard_path(tmp_path, 0).write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        CachedTeacher(tmp_path, plan).guide(0, make_batch(0))
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        open_cache(tmp_path, plan)


def test_other_vocabularies_and_widths_are_refused(tiny):
    (one, spec), (_, other) = tiny("llama"), tiny("llama", vocab_size=97)
    with pytest.raises(UserError, match="97 vocabulary rows"):
        check_vocabulary((spec, one.folder), (other, one.folder))
    narrow = tiny("llama", hidden_size=40)[1]
    check_matches(spec, spec, [(0, 3)])
    with pytest.raises(UserError, match="48 wide"):
        check_matches(spec, narrow, [(0, 3)])
    with pytest.raises(UserError, match="layers 0 to 3"):
        check_matches(spec, spec, [(0, 4)])


# The loop and its states


def make_trainer(tiny, steps=12, **options):
    checkpoint, spec = tiny("glm4", per_layer_config=UNEVEN)
    return Trainer(Student(checkpoint, spec), Objective(), LoopOptions(1e-2, Schedule(steps, WSD, 2), **options))


def run(trainer, tiny, count=None):
    """Train `count` steps (None: to the end); return the losses."""
    batches = Stream().batches(trainer.history.batches)
    steps = train(trainer, OnlineTeacher(Frozen(*tiny("glm4"), True)), batches)
    return [report.loss for report in islice(steps, count)]


def test_training_lowers_the_loss(tiny):
    losses = run(make_trainer(tiny, 30), tiny)
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_saved_run_continues_to_the_same_bits(tiny, tmp_path):
    options = {"accumulate": 2, "average": 0.9}
    whole = make_trainer(tiny, **options)
    losses = run(whole, tiny)
    part = make_trainer(tiny, **options)
    run(part, tiny, 5)
    save_state(tmp_path, part)
    run(part, tiny, 2)  # steps after the last state are lost
    again = make_trainer(tiny, **options)
    load_state(find_state(tmp_path), again)
    assert again.history.step == 5
    assert run(again, tiny) == losses[5:]
    for name, tensor in whole.student.trained().items():
        assert torch.equal(tensor, again.student.trained()[name]), name
        assert torch.equal(whole.average.values[name], again.average.values[name]), name
    assert again.history == whole.history


def test_history_knows_the_rate_of_every_step(tiny, tmp_path):
    def go_on(rate, count):
        trainer = make_trainer(tiny)
        trainer.options = replace(trainer.options, rate=rate)
        if find_state(tmp_path):
            load_state(find_state(tmp_path), trainer)
        run(trainer, tiny, count)
        return trainer

    save_state(tmp_path, go_on(1e-2, 3))
    go_on(5e-3, 2)  # steps after the last state are lost, and so is their rate
    whole = go_on(1e-3, 4)
    save_state(tmp_path, whole)
    assert whole.history.rates == [(1, 1e-2), (4, 1e-3)]
    assert go_on(1e-3, 2).history.rates == [(1, 1e-2), (4, 1e-3)]
    assert go_on(1e-2, 2).history.rates == [(1, 1e-2), (4, 1e-3), (8, 1e-2)]


def test_last_two_states_are_kept_and_other_models_refused(tiny, tmp_path):
    trainer = make_trainer(tiny)
    for _ in range(3):
        run(trainer, tiny, 1)
        save_state(tmp_path, trainer)
    assert [path.name for path in list_states(tmp_path)] == ["state-00000002", "state-00000003"]
    other = Trainer(Student(*tiny("llama")), Objective(), LoopOptions(1e-2, Schedule(5)))
    with pytest.raises(UserError, match="another model"):
        load_state(find_state(tmp_path), other)


def test_run_folder_accepts_only_its_own_run(tmp_path):
    work, settings = tmp_path / "work", {"tokens": "1M", "seed": 0}
    with pytest.raises(UserError, match="no run to resume"):
        open_work(work, settings, True)
    open_work(work, settings, False)
    (work / "state-00000003").mkdir()
    (work / "run.json").rename(tmp_path / "run.json")  # what an interrupted removal would leave
    with pytest.raises(UserError, match="did not finish"):
        open_work(work, settings, False)
    (tmp_path / "run.json").rename(work / "run.json")
    (work / "state-00000003").rmdir()
    assert find_state(work) is None
    (work / ".state-00000003.partial-7").mkdir()
    open_work(work, settings, True)
    assert [path.name for path in work.iterdir()] == ["run.json"]
    with pytest.raises(UserError, match="did not finish"):
        open_work(work, settings, False)
    with pytest.raises(UserError, match=r"another tokens \(1M, now 2M\)"):
        open_work(work, {"tokens": "2M", "seed": 0}, True)


def test_nan_stops_before_the_step_and_is_never_saved(tiny, tmp_path):
    trainer = make_trainer(tiny)
    run(trainer, tiny, 1)
    trainer.student.ends["final_norm"][3] = math.nan
    before = {name: tensor.clone() for name, tensor in trainer.student.trained().items()}
    with pytest.raises(Diverged, match="loss is nan") as stopped:
        run(trainer, tiny)
    assert stopped.value.step == 2
    for name, tensor in trainer.student.trained().items():
        assert torch.equal(tensor.isnan(), before[name].isnan())
    with pytest.raises(Diverged, match=r"final_norm is not finite"):
        save_state(tmp_path, trainer)
    assert list_states(tmp_path) == []


def test_rising_loss_is_divergence():
    history = History()
    with pytest.raises(Diverged, match="rose from 0.5"):
        for loss in [0.5] * 10 + [0.7] * 50 + [9.0] * 10:
            history.step += 1
            watch_loss(history, loss)
            assert history.rising == (history.step > 60)
    assert 61 < history.step < 70


def test_curve_forgets_what_was_not_saved(tiny, tmp_path):
    trainer = make_trainer(tiny)
    curve = Curve(tmp_path, 0)
    for report in islice(train(trainer, OnlineTeacher(Frozen(*tiny("glm4"), True)), Stream().batches()), 4):
        curve.add(report, 0.5 if report.step == 2 else None)
    with curve.path.open("a") as file:
        file.write("5,20")  # a killed run's last row
    rows = read_curve(curve.path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["heldout"] for row in rows] == ["", "0.5", "", ""]
    Curve(tmp_path, 2)
    assert [row["step"] for row in read_curve(curve.path)] == ["1", "2"]


def test_heldout_loss_is_the_mean_over_counted_tokens(tiny):
    checkpoint, spec = tiny("gemma2")
    student, batches = Student(checkpoint, spec), [make_batch(3), make_batch(4)]
    total = weight = 0.0
    for batch in batches:
        logits = student.logits(student(batch.ids, batch.documents)[0]).log_softmax(-1)
        for row in range(2):
            for place in range(1, 20):
                count = float(batch.weights[row, place])
                total -= count * float(logits[row, place - 1, batch.ids[row, place]])
                weight += count
    assert measure_loss(student, batches) == pytest.approx(total / weight, rel=1e-5)


# Merging


def test_merges_are_the_formula(tiny):
    base, one, two = (tiny("llama", rms_norm_eps=eps)[0] for eps in (1e-5, 1e-6, 1e-7))
    assert all(torch.equal(t, base.read_one(name)) for name, t in merge_step(base, [base, base], 0.7))
    values = {name: [c.read_one(name).double() for c in (base, one, two)] for name in base.tensors}
    for name, tensor in merge_step(base, [one, two], 0.25):
        first, a, b = values[name]
        torch.testing.assert_close(tensor.double(), first + 0.25 * ((a - first) + (b - first)) / 2)
    for name, tensor in average_checkpoints([one, two], [0.25, 0.75]):
        torch.testing.assert_close(tensor.double(), 0.25 * values[name][1] + 0.75 * values[name][2])
    with pytest.raises(UserError, match="one shape"):
        list(merge_step(base, [tiny("llama", intermediate_size=40)[0]]))
    with pytest.raises(UserError, match="does not"):
        list(merge_step(base, [tiny("llama-biases")[0]]))


# The verb

app = typer.Typer(cls=Verbs)
app.callback()(lambda: None)
app.command("recover", cls=Verb)(recover)
COMMAND = (
    "import typer; from cli.app import Verb, Verbs; from cli.recover import recover; app = typer.Typer(cls=Verbs);"
    "app.callback()(lambda: None); app.command('recover', cls=Verb)(recover); app()"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenised student, its dense model, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("verb")
    make_checkpoint(root / "dense", "llama")
    make_checkpoint(root / "cut", "llama", per_layer_config=UNEVEN)
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name in ("dense", "cut"):
        tokenizer.save(str(root / name / "tokenizer.json"))
    words = random.Random(0)
    documents = (" ".join(f"w{words.randint(3, 95)}" for _ in range(words.randint(4, 40))) for _ in range(80))
    (root / "words.txt").write_text("\n<|endoftext|>\n".join(documents))
    return root


def invoke(folders, out, *extra, tokens=960, taught=True):
    """Recover the cut model in this process."""
    return CliRunner().invoke(app, arguments(folders, out, *extra, tokens=tokens, taught=taught))


def arguments(folders, out, *extra, tokens=960, taught=True):
    given = ["recover", folders / "cut", "--text", folders / "words.txt", "-o", out, "--tokens", tokens, "--batch", 2]
    given += ["--length", 48, "--lr", 3e-3, *(["--teacher", folders / "dense"] if taught else [])]
    verify = [] if "--verify" in extra else ["--no-verify"]
    return [str(one) for one in [*given, *verify, *(one for one in extra if one != "--verify")]]


def read_weights(folder):
    checkpoint = open_checkpoint(folder)
    return checkpoint.read(checkpoint.tensors)


MANNERS = [
    (),
    ("--offline",),
    ("--loss", "mix", "--alpha", 0.5, "--match", "0,2:3", "--ema", 0.5),
    ("--lora", 2, "--schedule", "wsd", "--accumulate", 2),
]


@pytest.mark.parametrize("extra", MANNERS)
def test_recover_writes_a_better_folder(extra, folders, tmp_path):
    out = tmp_path / "out"
    done = invoke(folders, out, *extra, "--json", "--eval-text", folders / "words.txt", tokens=3000)
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    # Random models: the text's own loss need not fall, the divergence from the dense model does.
    curve = [float(row["loss"]) for row in read_curve(out / "recovery.csv")]
    assert len(curve) == facts["steps"] == math.ceil(3000 / 96 / (2 if "--accumulate" in extra else 1))
    assert sum(curve[-4:]) < sum(curve[:4])
    assert facts["heldout_loss"]["before"] != facts["heldout_loss"]["after"]
    assert open_checkpoint(out).config == open_checkpoint(folders / "cut").config
    manifest = json.loads((out / "lightpress.json").read_text())
    assert manifest["recovery"][0]["tokens"] == facts["tokens"]
    assert manifest["recovery"][0]["teacher"]["sha256"] == open_checkpoint(folders / "dense").sha256()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(read_weights(out)) == set(read_weights(folders / "cut"))


def test_offline_training_holds_no_teacher(folders, tmp_path, monkeypatch):
    held = []

    def look(self, report, *rest, add=Curve.add):
        add(self, report, *rest)
        held.append(sum(type(one) is Frozen for one in gc.get_objects()))

    gc.collect()
    monkeypatch.setattr(Curve, "add", look)
    assert invoke(folders, tmp_path / "online", tokens=192).exit_code == 0
    assert invoke(folders, tmp_path / "offline", "--offline", tokens=192).exit_code == 0
    assert held[:2] == [held[2] + 1] * 2


def test_offline_training_is_online_training_on_the_top(folders, tmp_path):
    online, offline = tmp_path / "online", tmp_path / "offline"
    assert invoke(folders, online).exit_code == 0
    cache = tmp_path / "cache"
    done = invoke(folders, offline, "--offline", "--cache", cache)
    assert done.exit_code == 0, done.stderr
    before, one, two = (read_weights(folder) for folder in (folders / "cut", online, offline))
    # The 13 likeliest of 96 random tokens say much, not all: both go the same way.
    moves = [torch.cat([(new[name] - before[name]).flatten() for name in before]) for new in (one, two)]
    assert float(F.cosine_similarity(*moves, dim=0)) > 0.5
    times = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    again = invoke(folders, tmp_path / "again", "--offline", "--cache", cache)
    assert again.exit_code == 0
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == times
    assert all(torch.equal(tensor, two[name]) for name, tensor in read_weights(tmp_path / "again").items())
    refused = invoke(folders, tmp_path / "other", "--offline", "--cache", cache, "--seed", 1)
    assert refused.exit_code == 2
    assert "another run" in refused.stderr


def test_finished_scores_ask_for_no_disk(folders, tmp_path, monkeypatch):
    cache, asked = tmp_path / "cache", []

    def measure(folder, size):
        """A disk that holds the scores once, and then nothing more."""
        asked.append((folder, size))
        if list(folder.glob("*.npy")) or full:
            raise UserError("the disk is full.")

    monkeypatch.setattr(cli.training_lessons, "check_space", measure)
    full = True
    done = invoke(folders, tmp_path / "out", "--offline", "--cache", cache)
    assert (done.exit_code, "the disk is full." in done.stderr) == (2, True)
    full = False
    done = invoke(folders, tmp_path / "out", "--offline", "--cache", cache)  # neither --resume nor another folder
    assert done.exit_code == 0, done.stderr
    # Ten batches of 96 tokens, 13 buckets in 58 bytes; a lesson that opens finished scores asks for nothing.
    assert asked == [(cache, 10 * 96 * 58)] * 2
    full = True
    done = invoke(folders, tmp_path / "again", "--offline", "--cache", cache)
    assert done.exit_code == 0, done.stderr
    assert len(asked) == 2


def test_killed_run_resumes_to_the_same_weights(folders, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    extra = ("--offline", "--save-steps", 4)
    assert invoke(folders, whole, *extra, tokens=2000).exit_code == 0
    command = [sys.executable, "-c", COMMAND, *arguments(folders, out, *extra, "--threads", 1, tokens=2000)]
    work = tmp_path / "out.training"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while len(list_states(work)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    other = invoke(folders, out, *extra, "--resume", tokens=4000)
    assert (other.exit_code, "another tokens (2000, now 4000)" in other.stderr) == (2, True)
    fresh = invoke(folders, out, *extra, tokens=2000)
    assert (fresh.exit_code, "--resume" in fresh.stderr) == (2, True)
    done = invoke(folders, out, *extra, "--resume", tokens=2000)
    assert done.exit_code == 0, done.stderr
    assert "Resuming after step" in done.stderr
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    rows = [[row["step"], row["loss"]] for row in read_curve(out / "recovery.csv")]
    assert rows == [[row["step"], row["loss"]] for row in read_curve(whole / "recovery.csv")]


def test_interrupt_saves_and_says_how_to_resume(folders, tmp_path, monkeypatch):
    out, steps = tmp_path / "out", []

    def interrupt(self, report, *rest, add=Curve.add):
        add(self, report, *rest)
        steps.append(report.step)
        if report.step == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Curve, "add", interrupt)
    stopped = invoke(folders, out)
    assert stopped.exit_code == 1
    assert "stopped after step 4 of 10" in stopped.stderr
    assert "--resume" in stopped.stderr
    assert not out.exists()
    wrong = Proof("transformers", DIFFERENT, reason="logits are others")
    monkeypatch.setattr(cli.trained, "verify_folder", lambda *given: [wrong])
    failed = invoke(folders, out, "--resume", "--verify")
    assert (failed.exit_code, "the training is kept" in failed.stderr, out.exists()) == (1, True, False)
    done = invoke(folders, out, "--resume")
    assert done.exit_code == 0, done.stderr
    assert steps == list(range(1, 11))


def stop_at(monkeypatch, step):
    """Interrupt a run after one of its steps."""

    def interrupt(self, report, *rest, add=Curve.add):
        add(self, report, *rest)
        if report.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Curve, "add", interrupt)


def test_each_state_is_written_once(folders, tmp_path, monkeypatch):
    written = []

    def write(folder, trainer, real=state.write_state):
        written.append(folder.name)
        real(folder, trainer)

    monkeypatch.setattr(state, "write_state", write)
    done = invoke(folders, tmp_path / "out", "--save-steps", 5)
    assert done.exit_code == 0, done.stderr
    assert written == ["state-00000005", "state-00000010"]
    stop_at(monkeypatch, 4)
    assert invoke(folders, tmp_path / "stopped", "--save-steps", 2).exit_code == 1
    assert written[2:] == ["state-00000002", "state-00000004"]


def test_manifest_tells_of_each_rate(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert invoke(folders, out).exit_code == 1
    done = invoke(folders, out, "--resume", "--lr", 1e-3, "--json")
    assert done.exit_code == 0, done.stderr
    entry = json.loads((out / "lightpress.json").read_text())["recovery"][0]
    assert entry["rates"] == [{"from_step": 1, "rate": 3e-3}, {"from_step": 5, "rate": 1e-3}]
    assert entry["rate"] == 1e-3
    assert json.loads(done.stdout)["rates"] == entry["rates"]
    factors = [rate_factor(Schedule(10, COSINE, entry["schedule"]["warmup"]), step) for step in range(10)]
    rates = [float(row["rate"]) for row in read_curve(out / "recovery.csv")]
    assert rates == pytest.approx([3e-3 * one for one in factors[:4]] + [1e-3 * one for one in factors[4:]], rel=1e-5)


def test_divergence_keeps_the_last_good_state(folders, tmp_path):
    out = tmp_path / "out"
    done = invoke(folders, out, "--loss", "ce", "--lr", 0.9, "--weight-decay", 1000, "--save-steps", 1, taught=False)
    assert done.exit_code == 1, done.stderr
    assert "Training diverged at step" in done.stderr
    assert "last good state" in done.stderr
    assert not out.exists()
    assert list_states(tmp_path / "out.training")


def test_merge_writes_the_mean(folders, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for seed, out in enumerate((one, two)):
        assert invoke(folders, out, "--seed", seed).exit_code == 0
    out = tmp_path / "merged"
    given = ["recover", folders / "cut", "--merge", f"{one},{two}", "-o", out, "--json"]
    done = CliRunner().invoke(app, [str(item) for item in given])
    assert done.exit_code == 0, done.stderr
    merged, a, b = (read_weights(folder) for folder in (out, one, two))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)


BAD = {
    "no text": (["{cut}", "--teacher", "{dense}"], "give --text FILE"),
    "no teacher": (["{cut}", "--text", "{text}"], "give --teacher FOLDER"),
    "idle teacher": (["{cut}", "--teacher", "{dense}", "--text", "{text}", "--loss", "ce"], "--teacher does nothing"),
    "idle alpha": (["{cut}", "--teacher", "{dense}", "--text", "{text}", "--alpha", "0.5"], "--alpha does nothing"),
    "idle cache": (["{cut}", "--teacher", "{dense}", "--text", "{text}", "--cache", "c"], "--cache does nothing"),
    "offline ce": (["{cut}", "--text", "{text}", "--loss", "ce", "--offline"], "--offline stores"),
    "offline match": (
        ["{cut}", "--teacher", "{dense}", "--text", "{text}", "--offline", "--match", "0"], "--match compares",
    ),
    "bad match": (["{cut}", "--teacher", "{dense}", "--text", "{text}", "--match", "a:b"], "--match a:b"),
    "bad tokens": (["{cut}", "--teacher", "{dense}", "--text", "{text}", "--tokens", "many"], "--tokens"),
    "bad loss": (["{cut}", "--teacher", "{dense}", "--text", "{text}", "--loss", "l2"], "--loss l2"),
    "bad rate": (["{cut}", "--teacher", "{dense}", "--text", "{text}", "--lr", "-1"], "--lr -1"),
    "bad schedule": (["{cut}", "--teacher", "{dense}", "--text", "{text}", "--schedule", "flat"], "--schedule flat"),
    "long rows": (["{cut}", "--teacher", "{dense}", "--text", "{text}", "--length", "512"], "--length 512"),
    "large batch": (["{cut}", "--teacher", "{dense}", "--text", "{text}", "--batch", "64"], "less than one batch"),
    "no such text": (["{cut}", "--teacher", "{dense}", "--text", "none.txt"], "none.txt"),
    "nothing to resume": (
        ["{cut}", "--text", "{text}", "--loss", "ce", "--resume", "--batch", "2"], "no run to resume",
    ),
    "other words": (["{cut}", "--teacher", "{other}", "--text", "{text}"], "120 vocabulary rows"),
    "idle merge": (["{cut}", "--merge", "{cut}", "--lr", "1e-3"], "--lr does nothing with --merge"),
    "idle merge rate": (["{cut}", "--merge-rate", "1"], "--merge-rate does nothing"),
    "merge shapes": (["{cut}", "--merge", "{dense}"], "one shape"),
    "merge rate": (["{cut}", "--merge", "{cut}", "--merge-rate", "nan"], "--merge-rate nan is no rate"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_sentence(name, folders, tmp_path):
    if not (folders / "other").exists():
        make_checkpoint(folders / "other", "llama", vocab_size=120)
    places = {key: str(folders / key) for key in ("cut", "dense", "other")} | {"text": str(folders / "words.txt")}
    given, words = BAD[name]
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["recover", *(one.format(**places) for one in given), "-o", str(out)])
    assert done.exit_code == 2, done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("lightpress: ")
    assert words in message
    assert list(tmp_path.iterdir()) == []
