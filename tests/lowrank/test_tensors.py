"""Decompositions against their exact limits, their bounds, and tensorly."""

import itertools
import math

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from tensorly.decomposition import tensor_train as tensorly_tt

from lightlib.lowrank import cp, tensor_train, tucker, tucker_ranks
from lightlib.lowrank.multilinear import distance, factor, fold, khatri_rao, mode_product, unfold
from lightlib.lowrank.tt_matrix import TTMatrix, bonds, rank_for, tt_matrix

SHAPE = (6, 7, 8)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tensor(generator):
    """Of no low rank, but with directions of very different size, as weights have."""
    T = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    for mode, n in enumerate(SHAPE):
        T = mode_product(T, torch.randn(n, n, generator=generator).double() * 0.6 ** torch.arange(n), mode)
    return T


@pytest.fixture
def tensorly_in_torch():
    with tensorly.backend_context("pytorch"):
        yield


def outer(*columns):
    """Sum over r of the outer products of the columns r, by loops."""
    T = torch.zeros([len(c) for c in columns], dtype=torch.float64)
    for index in itertools.product(*map(range, T.shape)):
        T[index] = math.prod(c[i] for i, c in zip(index, columns, strict=True)).sum()
    return T


def tails(tensor, ranks):
    """Energy of each unfolding beyond its rank."""
    return [torch.linalg.svdvals(unfold(tensor, k))[r:].square().sum() for k, r in enumerate(ranks)]


class TestShapes:
    def test_unfolding_puts_fibres_in_columns_in_tensorlys_order(self, tensor, tensorly_in_torch):
        for mode in range(3):
            assert torch.equal(unfold(tensor, mode), tensorly.unfold(tensor, mode))
            assert torch.equal(fold(unfold(tensor, mode), mode, SHAPE), tensor)
        assert torch.equal(unfold(tensor, 1)[:, 3 * 8 + 5], tensor[3, :, 5])

    def test_a_mode_product_multiplies_the_unfolding(self, tensor):
        M = torch.randn(5, 7, dtype=torch.float64)
        product = mode_product(tensor, M, 1)
        assert product.shape == (6, 5, 8)
        torch.testing.assert_close(unfold(product, 1), M @ unfold(tensor, 1))

    def test_columns_of_a_khatri_rao_product_are_kronecker_products(self):
        A, B = torch.randn(3, 4), torch.randn(5, 4)
        assert torch.equal(khatri_rao([A, B])[:, 2], torch.kron(A[:, 2], B[:, 2]))

    @pytest.mark.parametrize("n", [1, 7, 12, 97, 576, 1536, 49152])
    @pytest.mark.parametrize("parts", [1, 2, 3, 4])
    def test_factors_multiply_to_n_and_none_are_nearer_to_each_other(self, n, parts):
        found = factor(n, parts)
        assert math.prod(found) == n and len(found) == parts and list(found) == sorted(found)
        if n < 100:
            tuples = itertools.product([d for d in range(1, n + 1) if n % d == 0], repeat=parts)
            assert sum(found) == min(sum(each) for each in tuples if math.prod(each) == n)

    def test_a_number_that_has_no_parts_is_refused(self):
        with pytest.raises(ValueError, match=r"factor\(0, 2\): both must be at least 1"):
            factor(0, 2)


class TestTucker:
    def test_at_full_ranks_it_is_the_tensor_in_other_bases(self, tensor):
        found = tucker.hosvd(tensor.float(), SHAPE)
        assert found.core.dtype == torch.float32 and found.shape == SHAPE == found.ranks
        assert distance(tensor, found.to_tensor()) < 1e-6
        for U in found.factors:
            torch.testing.assert_close(U.T @ U, torch.eye(len(U)))

    def test_the_slices_of_its_core_are_orthogonal_and_fall_in_size(self, tensor):
        core = tucker.hosvd(tensor, SHAPE).core
        for mode in range(3):
            gram = unfold(core, mode) @ unfold(core, mode).T
            sizes = gram.diagonal()
            assert (gram - sizes.diag()).abs().max() < 1e-8 * sizes.max()
            assert (sizes[:-1] >= sizes[1:]).all()

    def test_a_mode_left_whole_has_no_matrix_and_loses_nothing(self, tensor):
        found = tucker.hosvd(tensor, (None, 7, None))
        assert found.factors[0] is None and found.stored == tensor.numel() + 49
        assert distance(tensor, found.to_tensor()) < 1e-12
        one = tucker.hosvd(tensor, (None, 3, None))
        assert distance(tensor, one.to_tensor()) ** 2 * tensor.square().sum() == pytest.approx(
            tails(tensor, (6, 3, 8))[1].item()
        )

    def test_of_a_matrix_it_is_the_truncated_svd(self, tensor):
        M = tensor[0]
        _, S, _ = torch.linalg.svd(M)
        found = tucker.hosvd(M, (3, 3))
        assert distance(M, found.to_tensor()) == pytest.approx((S[3:].norm() / S.norm()).item())
        torch.testing.assert_close(found.core.abs(), S[:3].diag())

    def test_its_error_is_within_the_tails_of_the_unfoldings_and_falls_with_the_ranks(self, tensor):
        errors = []
        for r in range(1, 7):
            found = tucker.hosvd(tensor, (r, r, r))
            lost = (tensor - found.to_tensor()).square().sum()
            energy = tails(tensor, (r, r, r))
            assert max(energy) <= lost * (1 + 1e-9) <= sum(energy) * (1 + 1e-9)
            errors.append(lost)
        assert all(a > b for a, b in itertools.pairwise(errors))

    def test_iterating_never_makes_it_worse(self, tensor):
        for ranks in [(2, 2, 2), (3, 2, 4), (1, 1, 1), (4, None, 2)]:
            errors = [distance(tensor, tucker.hosvd(tensor, ranks).to_tensor())]
            errors += [
                distance(tensor, tucker.hooi(tensor, ranks, sweeps, tolerance=0).to_tensor())
                for sweeps in (1, 2, 5)
            ]
            assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
        assert errors[-1] < errors[0]

    def test_a_tensor_of_such_ranks_is_recovered(self, generator):
        core = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
        factors = tuple(
            torch.randn(n, r, generator=generator).double() for n, r in zip(SHAPE, core.shape, strict=True)
        )
        T = tucker.Tucker(core, factors).to_tensor()
        assert distance(T, tucker.hooi(T, (2, 3, 2)).to_tensor()) < 1e-12
        assert distance(T, tucker.hooi(T, (2, 2, 2)).to_tensor()) > 1e-3

    @pytest.mark.parametrize("ranks", [(2, 2, 2), (3, 4, 2), (5, 6, 7)])
    def test_it_ends_where_tensorlys_does(self, tensor, ranks, tensorly_in_torch):
        (core, factors), _ = partial_tucker(tensor, ranks, n_iter_max=200, tol=1e-14)
        theirs = distance(tensor, tensorly.tucker_to_tensor((core, factors)))
        ours = distance(tensor, tucker.hooi(tensor, ranks, sweeps=200, tolerance=1e-15).to_tensor())
        assert ours == pytest.approx(theirs, rel=1e-5)

    def test_ranks_for_a_budget_are_in_proportion_and_use_it(self):
        for stored in (2_000, 20_000, 200_000):
            ranks = tucker_ranks.ranks_for((9, 64, 576), stored, whole=[0])
            assert ranks[0] is None and tucker_ranks.stored_by((9, 64, 576), ranks) <= stored
            more = (None, ranks[1] + 1, min(ranks[2] + 9, 9 * (ranks[1] + 1)))
            assert tucker_ranks.stored_by((9, 64, 576), more) > stored
        found = tucker.hosvd(torch.randn(4, 6, 8), tucker_ranks.ranks_for((4, 6, 8), 100))
        assert found.stored <= 100
        assert tucker_ranks.ranks_for((4, 6, 8), 4 * 6 * 8) == (None, None, None)

    def test_no_rank_is_larger_than_the_others_can_fill(self):
        a, b = tucker_ranks.ranks_for((1536, 576), 700_000)
        assert a == b

    @pytest.mark.parametrize("whole", [(), (0,), (0, 1)])
    def test_ranks_by_energy_lose_least_of_all_that_fit(self, tensor, whole):
        tails = tucker_ranks.tails(tensor, whole)
        for tail in tails:
            assert tail is None or (
                tail[0].item() == pytest.approx(tensor.square().sum().item()) and tail[-1] == 0
            )

        def lost(ranks):
            free = [(r, tail) for r, tail in zip(ranks, tails, strict=True) if tail is not None]
            return sum(0 if r is None else tail[r].item() for r, tail in free)

        for stored in (100, 150, 250, 336):
            ranks = tucker_ranks.ranks_by_energy(SHAPE, tails, stored)
            assert tucker_ranks.stored_by(SHAPE, ranks) <= stored
            each = [[None] if k in whole else [*range(1, n), None] for k, n in enumerate(SHAPE)]
            fitting = [r for r in itertools.product(*each) if tucker_ranks.stored_by(SHAPE, r) <= stored]
            assert lost(ranks) == min(map(lost, fitting))

    def test_what_does_not_fit_is_said(self, tensor):
        with pytest.raises(
            ValueError, match=r"q: 6 x 7 x 8 takes 22 numbers at ranks of 1, 20 may be stored"
        ):
            tucker_ranks.ranks_by_energy(SHAPE, tucker_ranks.tails(tensor), 20, "q")
        with pytest.raises(ValueError, match=r"q: 4 x 4 takes 9 numbers at ranks of 1, 8 may be stored"):
            tucker_ranks.ranks_for((4, 4), 8, name="q")
        with pytest.raises(ValueError, match="mode 1: rank 9 does not lie from 1 to 7"):
            tucker.hooi(tensor, (1, 9, 1))
        with pytest.raises(ValueError, match="6 x 7 x 8 has 3 modes, and ranks for 2 are given"):
            tucker.hosvd(tensor, (1, 1))


class TestCP:
    def test_it_is_a_sum_of_outer_products(self, generator):
        A, B, C = (torch.randn(n, 3, generator=generator).double() for n in (3, 4, 5))
        w = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
        torch.testing.assert_close(cp.CP(w, (A, B, C)).to_tensor(), outer(A * w, B, C))

    def test_a_tensor_of_rank_3_is_recovered(self, generator):
        T = outer(*(torch.randn(n, 3, generator=generator).double() for n in (5, 6, 7)))
        found = cp.als(T, 3, sweeps=500, tolerance=0)
        assert distance(T, found.to_tensor()) < 1e-6
        assert found.rank == 3 and found.shape == (5, 6, 7) and found.stored == 3 * 19
        for A in found.factors:
            torch.testing.assert_close(A.norm(dim=0), torch.ones(3, dtype=torch.float64))

    def test_its_errors_are_true_and_never_grow(self, tensor):
        for rank in (1, 4, 9):
            found = cp.als(tensor, rank, sweeps=30, tolerance=0)
            assert found.errors[-1] == pytest.approx(distance(tensor, found.to_tensor()), abs=1e-7)
            assert all(b <= a + 1e-9 for a, b in itertools.pairwise(found.errors))
        assert len(found.errors) == 31

    def test_errors_fall_with_the_rank_and_end_at_nothing(self, tensor):
        errors = [cp.als(tensor, rank, sweeps=60).errors[-1] for rank in (1, 2, 4, 8, 16)]
        assert errors == sorted(errors, reverse=True)
        # 6 x 7 outer products of unit vectors and fibres make any such tensor
        assert cp.als(tensor, 42, sweeps=60).errors[-1] < 1e-5

    def test_of_rank_1_it_is_the_best_of_tucker(self, tensor):
        one = tucker.hooi(tensor, (1, 1, 1), sweeps=50)
        assert cp.als(tensor, 1, sweeps=50).errors[-1] == pytest.approx(distance(tensor, one.to_tensor()))

    @pytest.mark.parametrize("rank", [2, 5, 8])
    def test_from_the_same_start_it_ends_where_tensorlys_does(self, tensor, rank, tensorly_in_torch):
        start = cp.first_factors(tensor, rank, seed=0)
        theirs = parafac(tensor, rank, n_iter_max=40, init=(None, [A.clone() for A in start]), tol=0)
        ours = cp.als(tensor, rank, sweeps=40, tolerance=0, start=start)
        error = distance(tensor, tensorly.cp_to_tensor(theirs))
        assert ours.errors[-1] == pytest.approx(error, rel=1e-4)

    def test_columns_that_are_alike_do_no_harm(self):
        T = outer(*(torch.ones(n, 1).double() for n in (4, 5, 6)))
        found = cp.als(T, 4, sweeps=5)
        assert found.errors[-1] < 1e-6 and all(A.isfinite().all() for A in found.factors)
        nothing = cp.als(torch.zeros(4, 5, 6), 3, sweeps=5)
        assert torch.equal(nothing.to_tensor(), torch.zeros(4, 5, 6)) and nothing.errors[-1] == 0

    def test_the_khatri_rao_product_is_multiplied_without_being_built(self, generator):
        shape = (3, 5, 4, 6)
        T = torch.randn(shape, generator=generator)
        factors = [torch.randn(n, 7, generator=generator) for n in shape]
        for mode in range(4):
            others = khatri_rao([A for k, A in enumerate(factors) if k != mode])
            torch.testing.assert_close(cp.times_khatri_rao(T, factors, mode), unfold(T, mode) @ others)

    def test_a_vector_and_rank_0_are_refused(self):
        with pytest.raises(ValueError, match="at least two modes, rank 1"):
            cp.als(torch.ones(5), 1)
        with pytest.raises(ValueError, match="3 x 4 holds numbers that are not finite"):
            cp.als(torch.full((3, 4), torch.nan), 1)
        with pytest.raises(ValueError, match="rank 0"):
            cp.als(torch.ones(5, 5), 0)


class TestTensorTrain:
    def test_without_a_limit_it_is_exact_and_its_entries_are_products_of_matrices(self, tensor):
        train = tensor_train.tt_svd(tensor.float())
        assert train.ranks == (6, 8) and train.shape == SHAPE and train.cores[0].dtype == torch.float32
        assert train.stored == sum(core.numel() for core in train.cores) == 36 + 6 * 7 * 8 + 64
        assert distance(tensor, train.to_tensor()) < 1e-6
        entry = train.cores[0][:, 2] @ train.cores[1][:, 3] @ train.cores[2][:, 4]
        assert entry.item() == pytest.approx(tensor[2, 3, 4].item(), rel=1e-4)

    def test_of_a_matrix_it_is_the_truncated_svd(self, tensor):
        S = torch.linalg.svdvals(tensor[0])
        train = tensor_train.tt_svd(tensor[0], 3)
        assert distance(tensor[0], train.to_tensor()) == pytest.approx((S[3:].norm() / S.norm()).item())

    def test_all_cores_but_the_last_are_orthogonal(self, tensor):
        for core in tensor_train.tt_svd(tensor, 3).cores[:-1]:
            flat = core.flatten(0, 1)
            torch.testing.assert_close(flat.T @ flat, torch.eye(flat.shape[1], dtype=torch.float64))

    def test_its_error_is_within_the_tails_of_its_bonds_so_within_sqrt_of_d_minus_1_of_the_best(
        self, generator
    ):
        shape = (4, 5, 6, 3)
        T = torch.randn(shape, generator=generator, dtype=torch.float64)
        before = torch.inf
        for rank in range(1, 13):
            lost = (T - tensor_train.tt_svd(T, rank).to_tensor()).square().sum()
            energy = [
                torch.linalg.svdvals(T.reshape(math.prod(shape[:k]), -1))[rank:].square().sum()
                for k in (1, 2, 3)
            ]
            # no train of these ranks is better than the worst of the tails alone
            assert max(energy) - 1e-9 <= lost <= sum(energy) + 1e-9 <= 3 * max(energy) + 1e-9
            assert lost <= before
            before = lost
        assert tensor_train.tt_svd(T, 18).ranks == tensor_train.full_ranks(shape) == (4, 18, 3)

    @pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01])
    def test_the_tolerance_is_kept_with_no_rank_wasted(self, tensor, tolerance):
        train = tensor_train.tt_svd(tensor, tolerance=tolerance)
        assert distance(tensor, train.to_tensor()) <= tolerance
        assert train.stored < tensor_train.tt_svd(tensor).stored
        assert distance(tensor, tensor_train.tt_svd(tensor, 1).to_tensor()) > 0.01

    @pytest.mark.parametrize("ranks", [(2, 2), (4, 3), (6, 8)])
    def test_its_errors_and_cores_are_tensorlys(self, tensor, ranks, tensorly_in_torch):
        theirs = tensorly_tt(tensor, rank=[1, *ranks, 1])
        ours = tensor_train.tt_svd(tensor, ranks)
        error = distance(tensor, tensorly.tt_to_tensor(theirs))
        assert distance(tensor, ours.to_tensor()) == pytest.approx(error, rel=1e-8, abs=1e-12)
        torch.testing.assert_close(ours.cores[0].abs(), theirs[0].abs())

    def test_rounding_a_sum_finds_the_ranks_of_the_tensor(self, tensor):
        train = tensor_train.tt_svd(tensor, 3)
        twice = tensor_train.added(train, train)
        assert twice.ranks == (6, 6)
        torch.testing.assert_close(twice.to_tensor(), 2 * train.to_tensor())
        again = tensor_train.rounded(twice, tolerance=1e-10)
        assert again.ranks == (3, 3)
        assert distance(2 * train.to_tensor(), again.to_tensor()) < 1e-9

    def test_rounding_is_the_svd_of_the_tensor_that_is_not_built(self, tensor):
        train = tensor_train.tt_svd(tensor)
        for limits in ({"ranks": 2}, {"ranks": (4, 3)}, {"tolerance": 0.1}):
            small, direct = tensor_train.rounded(train, **limits), tensor_train.tt_svd(tensor, **limits)
            assert small.ranks == direct.ranks
            torch.testing.assert_close(small.to_tensor(), direct.to_tensor())

    def test_ranks_that_do_not_fit_are_refused(self, tensor):
        with pytest.raises(ValueError, match="6 x 7 x 8 has 2 bonds, each of rank 1 or more"):
            tensor_train.tt_svd(tensor, (1, 2, 3))
        with pytest.raises(ValueError, match="no sum"):
            tensor_train.added(tensor_train.tt_svd(tensor), tensor_train.tt_svd(tensor[0]))


class TestTTMatrix:
    OUT, IN = (3, 4, 2), (2, 5, 3)

    def test_without_a_limit_it_is_exact_and_its_entries_are_products_of_matrices(self, generator):
        W = torch.randn(24, 30, generator=generator)
        train = tt_matrix(W, self.OUT, self.IN)
        assert train.out_shape == self.OUT and train.in_shape == self.IN
        torch.testing.assert_close(train.to_matrix(), W)
        row, column = (2, 1, 1), (1, 3, 2)
        entry = torch.eye(1)
        for core, o, i in zip(train.cores, row, column, strict=True):
            entry = entry @ core[:, o, i]
        assert entry.item() == pytest.approx(W[2 * 8 + 1 * 2 + 1, 1 * 15 + 3 * 3 + 2].item(), abs=1e-5)

    def test_a_kronecker_product_has_bonds_of_1(self, generator):
        A, B, C = (torch.randn(o, i, generator=generator) for o, i in zip(self.OUT, self.IN, strict=True))
        W = torch.kron(torch.kron(A, B), C)
        train = tt_matrix(W, self.OUT, self.IN, tolerance=1e-5)
        assert train.ranks == (1, 1) and train.stored == 6 + 20 + 6
        torch.testing.assert_close(train.to_matrix(), W, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("order", ["left to right", "right to left"])
    def test_inputs_pass_core_by_core_as_they_pass_the_matrix(self, generator, order):
        for rank in (1, 4, None):
            train = tt_matrix(torch.randn(24, 30, generator=generator), self.OUT, self.IN, rank)
            x = torch.randn(2, 7, 30, generator=generator)
            torch.testing.assert_close(train.times(x, order), x @ train.to_matrix().T, rtol=1e-5, atol=1e-5)

    def test_the_rank_for_a_budget_is_the_largest_that_fits(self):
        for stored in (100, 300, 700):
            rank = rank_for(self.OUT, self.IN, stored)
            fits, more = (
                sum(r * o * i * s for o, i, r, s in zip(self.OUT, self.IN, (1, *b), (*b, 1), strict=True))
                for b in (bonds(self.OUT, self.IN, rank), bonds(self.OUT, self.IN, rank + 1))
            )
            assert fits <= stored and (more > stored or more == fits)

    def test_what_does_not_fit_is_said(self):
        with pytest.raises(
            ValueError, match=r"q: \(31\) x \(37\) takes 1147 numbers at rank 1, 9 may be stored"
        ):
            rank_for((31,), (37,), 9, "q")
        with pytest.raises(ValueError, match=r"a weight of 24 x 30 is not \(6 x 4\) x \(30\)"):
            tt_matrix(torch.ones(24, 30), (6, 4), (30,))

    def test_one_core_is_the_matrix(self):
        W = torch.randn(5, 3)
        train = tt_matrix(W, (5,), (3,))
        assert isinstance(train, TTMatrix) and train.ranks == ()
        torch.testing.assert_close(train.times(torch.eye(3)), W.T)
