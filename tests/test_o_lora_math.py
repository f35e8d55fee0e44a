"""O-LoRA's penalties, drift and InfLoRA's matrix against loops written from the papers."""

import math

import pytest
import torch
from conftest import check_shapes

from trueline.errors import ConfigError
from trueline.methods import drift as drifts
from trueline.methods import inf_lora
from trueline.methods import o_lora as methods

overlap, share, norm = (check_shapes(f) for f in (methods.overlap, methods.share, methods.norm))
row_basis, drift = check_shapes(methods.row_basis), check_shapes(drifts.drift)
reading_matrix = check_shapes(inf_lora.reading_matrix)
grow_basis = check_shapes(inf_lora.grow_basis)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def draw(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def orthonormal(rows):
    """Gram-Schmidt, a row at a time."""
    basis = []
    for row in rows:
        row = row.clone()
        for b in basis:
            row = row - (row @ b) * b
        if row.norm() > 1e-9:
            basis.append(row / row.norm())
    return basis


# -- the release's and the paper's sums


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize(("penalty", "power"), [("abs", 1), ("squared", 2)])
def test_overlap_is_the_sum_over_tasks_and_entries(generator, tasks, penalty, power):
    past = [draw(generator, rank, 7) for rank in range(1, tasks + 1)]
    new = draw(generator, 3, 7)
    expected = 0.0
    for a in past:
        for j in range(len(a)):
            for k in range(3):
                expected += abs(sum(float(a[j, i] * new[k, i]) for i in range(7))) ** power
    assert overlap(new, torch.cat(past), penalty).item() == pytest.approx(expected, rel=1e-12)


def test_release_loop_over_named_parameters(generator):
    """The released loss: pairs of parameters found by name, |A_old @ A_new^T| summed."""
    modules = ["0.q", "0.v", "1.q"]
    named = {}
    for m in modules:
        named[f"{m}.lora_A.weight"] = draw(generator, 8, 16)
        named[f"{m}.loranew_A.weight"] = draw(generator, 4, 16)
        named[f"{m}.loranew_B.weight"] = draw(generator, 16, 4)
    orthogonal, l2 = 0.0, 0.0
    for name, param in named.items():
        if "lora_A" in name:
            for name_, param_ in named.items():
                same = name_.split(".lora")[0] == name.split(".lora")[0]
                if "loranew_A" in name_ and same:
                    orthogonal += torch.abs(torch.mm(param, param_.T)).sum()
        if "loranew_" in name:
            l2 += torch.norm(param, p=2)
    ours = sum(
        overlap(named[f"{m}.loranew_A.weight"], named[f"{m}.lora_A.weight"]) for m in modules
    )
    norms = sum(
        norm(named[f"{m}.loranew_A.weight"], named[f"{m}.loranew_B.weight"]) for m in modules
    )
    torch.testing.assert_close(ours, orthogonal)
    torch.testing.assert_close(norms, l2)


def test_squared_gradient(generator):
    a, past = draw(generator, 3, 6).requires_grad_(), draw(generator, 4, 6)
    for normalize in (False, True):
        assert torch.autograd.gradcheck(lambda a, n=normalize: overlap(a, past, "squared", n), [a])


def test_abs_gradient_is_the_sum_of_signs(generator):
    a, past = draw(generator, 3, 6).requires_grad_(), draw(generator, 4, 6)
    overlap(a, past, "abs").backward()
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for k in range(3):
        for p in past:
            expected[k] += math.copysign(1, float(p @ a[k].detach())) * p
    torch.testing.assert_close(a.grad, expected)
    # away from zero both forms have an ordinary gradient
    assert torch.autograd.gradcheck(lambda a: overlap(a, past, "abs"), [a])
    assert torch.autograd.gradcheck(lambda a: overlap(a, past, "abs", True), [a])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("penalty", ["abs", "squared"])
def test_no_past_task_gives_exactly_zero(generator, penalty, normalize):
    a = draw(generator, 3, 6).requires_grad_()
    value = overlap(a, torch.zeros(0, 6, dtype=torch.float64), penalty, normalize)
    value.backward()
    assert value.item() == 0
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_unknown_penalty():
    with pytest.raises(ConfigError, match='Did you mean "squared"'):
        methods.overlap(torch.ones(1, 2), torch.ones(1, 2), "square")


# -- the normalised form


@pytest.mark.parametrize("penalty", ["abs", "squared"])
def test_share_is_the_length_of_the_projection(generator, penalty):
    new, past = draw(generator, 4, 9), draw(generator, 5, 9)
    past[3] = 2 * past[1] - past[0]  # the span has four dimensions
    expected = 0.0
    for row in new:
        inside = sum(float(row @ b) ** 2 for b in orthonormal(past))
        cosine = math.sqrt(inside) / float(row.norm())
        expected += (cosine if penalty == "abs" else cosine**2) / 4
    assert overlap(new, past, penalty, True).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("penalty", ["abs", "squared"])
def test_share_is_0_outside_1_inside_and_blind_to_length(generator, penalty):
    past = draw(generator, 3, 8)
    basis = torch.stack(orthonormal(past))
    outside = draw(generator, 2, 8)
    outside = outside - outside @ basis.T @ basis
    inside = draw(generator, 2, 3) @ past
    assert overlap(outside, past, penalty, True).item() == pytest.approx(0, abs=1e-12)
    assert overlap(inside, past, penalty, True).item() == pytest.approx(1)
    both = outside + inside
    scales = torch.tensor([[1e-3], [7.0]], dtype=torch.float64)
    reference = overlap(both, past, penalty, True)
    torch.testing.assert_close(overlap(both * scales, past, penalty, True), reference)
    scales = torch.tensor([[1e-3], [5.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(overlap(both, past * scales, penalty, True), reference)


@pytest.mark.parametrize(("rank", "width", "tasks"), [(4, 64, 1), (16, 64, 1), (4, 512, 1)])
def test_share_at_one_angle_does_not_depend_on_rank_width_or_tasks(generator, rank, width, tasks):
    """Sums grow with all of them; the share of rows at 60 degrees is 1/2 (abs), 1/4 (squared)."""
    frame = torch.linalg.qr(draw(generator, width, width))[0]
    for tasks in (1, 2):
        past = frame[: rank * tasks]
        new = 0.5 * past[:rank] + math.sqrt(0.75) * frame[-rank:]
        assert overlap(new, past, "abs", True).item() == pytest.approx(0.5)
        assert overlap(new, past, "squared", True).item() == pytest.approx(0.25)
        assert overlap(new, past, "abs").item() == pytest.approx(0.5 * rank)


def test_gradient_is_finite_at_zero_and_where_nothing_is_free(generator):
    for rows in (torch.zeros(2, 5), torch.eye(5)[:2], torch.eye(5)[3:]):
        for penalty in ("abs", "squared"):
            a = rows.clone().requires_grad_()
            overlap(a, torch.eye(5)[:2], penalty, True).backward()
            assert a.grad.isfinite().all()
    full = draw(generator, 6, 5)
    a = draw(generator, 2, 5).requires_grad_()
    value = overlap(a, full, "abs", True)
    value.backward()
    assert value.item() == pytest.approx(1)
    assert a.grad.abs().max() < 1e-12


def test_row_basis(generator):
    rows = draw(generator, 4, 6)
    rows[2] = rows[0] + rows[1]
    rows[3] *= 1e-9  # small rows count like any other
    basis = row_basis(rows)
    assert basis.shape == (3, 6)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(rows @ basis.T @ basis, rows)
    assert row_basis(torch.zeros(2, 6)).shape == row_basis(torch.zeros(0, 6)).shape == (0, 6)


def test_norm(generator):
    a, b = draw(generator, 4, 6), draw(generator, 5, 4)
    expected = sum(math.sqrt(sum(float(x) ** 2 for x in m.flatten())) for m in (a, b))
    assert norm(a, b).item() == pytest.approx(expected)
    assert norm(a, b, normalize=True).item() == pytest.approx(expected / 2)
    # b is 0 at the start: no NaN, no pull
    b = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    norm(a, b).backward()
    assert torch.equal(b.grad, torch.zeros_like(b))


# -- drift


def test_drift_is_the_mean_change_of_outputs(generator):
    a, b = draw(generator, 2, 6), draw(generator, 5, 2)
    inputs, gradients = draw(generator, 20, 6), draw(generator, 30, 5)
    factor = drifts.factor_of(inputs.T @ inputs / 20)
    expected = sum(float((b @ (a @ x)).square().sum()) for x in inputs) / 20
    assert drift(a, b, factor).item() == pytest.approx(expected, rel=1e-10)
    out = drifts.factor_of(gradients.T @ gradients / 30)
    expected = sum(float(g @ (b @ (a @ x))) ** 2 for x in inputs for g in gradients) / 600
    assert drift(a, b, factor, out).item() == pytest.approx(expected, rel=1e-10)


def test_drift_gradient_and_zero(generator):
    a, b = draw(generator, 2, 6).requires_grad_(), draw(generator, 5, 2).requires_grad_()
    factor, out = draw(generator, 3, 6), draw(generator, 4, 5)
    assert torch.autograd.gradcheck(lambda a, b: drift(a, b, factor), [a, b])
    assert torch.autograd.gradcheck(lambda a, b: drift(a, b, factor, out), [a, b])
    zero = torch.zeros_like(b).requires_grad_()
    value = drift(a, zero, factor, out)
    value.backward()
    assert value.item() == 0
    assert torch.equal(zero.grad, torch.zeros_like(b))
    assert drift(a, b, factor[:0]).item() == 0


def test_relative_drift_is_1_for_doubling_the_weight(generator):
    weight, inputs = draw(generator, 5, 6), draw(generator, 40, 6)
    factor = drifts.factor_of(inputs.T @ inputs / 40)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    scaled = drifts.relative(factor, weight)
    assert drift(v, u * s, scaled).item() == pytest.approx(1)
    # whatever the size of weights and inputs
    scaled = drifts.relative(factor * 100, weight * 0.01)
    assert drift(v, u * s * 0.01, scaled).item() == pytest.approx(1)
    assert drifts.relative(factor * 0, weight).abs().max() == 0


def test_factor_keeps_what_is_asked(generator):
    frame = torch.linalg.qr(draw(generator, 4, 4))[0]
    moment = frame.T @ torch.diag(torch.tensor([6.0, 3.0, 1.0, 0.0]).double()) @ frame
    assert len(drifts.factor_of(moment)) == 3
    assert len(drifts.factor_of(moment, keep=0.9)) == 2
    assert len(drifts.factor_of(moment, keep=0.91)) == 3
    two = drifts.factor_of(moment, rank=2)
    assert two.square().sum().item() == pytest.approx(9)
    full = drifts.factor_of(moment)
    torch.testing.assert_close(full.T @ full, moment)


def test_mean_factor_is_the_mean_of_moments(generator):
    factors = [draw(generator, n, 5) for n in (2, 5, 4)]
    mean = sum(f.T @ f for f in factors) / 3
    found = drifts.mean_factor(factors)
    assert len(found) == 5
    torch.testing.assert_close(found.T @ found, mean)
    few = drifts.mean_factor(factors, rank=2)
    values = torch.linalg.eigvalsh(mean)
    assert few.square().sum().item() == pytest.approx(values[-2:].sum().item())


# -- InfLoRA


def test_reading_matrix_is_blind_to_earlier_inputs_and_sees_the_new(generator):
    earlier = draw(generator, 30, 3) @ draw(generator, 3, 10)
    new = draw(generator, 50, 10) * torch.linspace(3, 0.1, 10, dtype=torch.float64)
    basis = grow_basis(torch.zeros(0, 10, dtype=torch.float64), earlier, 1.0)
    assert basis.shape == (3, 10)
    a = reading_matrix(new, basis, 2)
    assert (earlier @ a.T).abs().max() < 1e-10
    torch.testing.assert_close(a @ a.T, torch.eye(2, dtype=torch.float64) / 3)
    # no other two rows outside the basis hold more of what is left of the new inputs
    projector = torch.eye(10, dtype=torch.float64) - basis.T @ basis
    left = torch.linalg.eigvalsh(projector @ new.T @ new @ projector)
    assert 3 * (new @ a.T).square().sum().item() == pytest.approx(left[-2:].sum().item())


def test_reading_matrix_depends_on_the_moment_alone(generator):
    inputs, basis = draw(generator, 40, 6), draw(generator, 0, 6)
    factor = drifts.factor_of(inputs.T @ inputs / 40)
    one, other = (reading_matrix(f, basis, 2) for f in (inputs, factor))
    torch.testing.assert_close(one.T @ one, other.T @ other)


def test_reading_matrix_fills_up_and_refuses(generator):
    basis = torch.eye(6, dtype=torch.float64)[:3]
    a = reading_matrix(basis[:1] * 5, basis, 3)  # the new inputs lie in the basis
    torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=torch.float64) / 3)
    assert (a @ basis.T).abs().max() < 1e-12
    with pytest.raises(ConfigError, match="leave 3 of 6 directions, `rank` asks for 4"):
        reading_matrix(draw(generator, 9, 6), basis, 4)


def test_basis_grows_by_the_fewest_rows(generator):
    frame = torch.linalg.qr(draw(generator, 6, 6))[0]
    energy = torch.tensor([5.0, 3.0, 1.5, 0.5, 0.0, 0.0]).double()
    factor = energy.sqrt()[:, None] * frame
    empty = draw(generator, 0, 6)
    for threshold, count in ((0.0, 0), (0.5, 1), (0.79, 2), (0.81, 3), (1.0, 4)):
        basis = grow_basis(empty, factor, threshold)
        assert len(basis) == count
        held = float((factor @ basis.T).square().sum()) / 10
        assert held >= threshold - 1e-12
    # what the basis holds already counts
    grown = grow_basis(frame[:1], factor, 0.79)
    torch.testing.assert_close(grown @ grown.T, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(grown[:1], frame[:1])
    assert abs(float(grown[1] @ frame[1])) == pytest.approx(1)
    assert torch.equal(grow_basis(grown, factor, 0.5), grown)
