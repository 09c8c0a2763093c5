"""What only a GPU can show."""

import pytest
import torch
from kernel_cases import assert_meets, backward, make
from repcon_kernels import multi_head_kl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_cuda_graphs_replay_with_other_values() -> None:
    """Captured with its labels gathered by row; two graphs at once do not disturb one another's sums."""
    graphs, cases, outputs = [], [], []
    for seed in range(2):
        case = make(512, [(1000, 16), (196, 16), (45, 45)], gathered=True, seed=seed).to("cuda")
        leaf = torch.zeros_like(case.logits).requires_grad_()

        def step(case=case, leaf=leaf) -> tuple[torch.Tensor, torch.Tensor]:
            losses = multi_head_kl(
                leaf, case.heads, case.ids, case.logp, rows=case.rows, weights=case.weights, implementation="triton"
            )
            return losses, torch.autograd.grad((losses * case.upstream).sum(), leaf)[0]

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(step())
        with torch.no_grad():
            leaf.copy_(case.logits)
        graphs.append(graph)
        cases.append(case)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for case, (losses, gradient) in zip(cases, outputs, strict=True):
        assert_meets(case, "uniform", losses.detach().cpu(), gradient.cpu())


def test_no_step_waits_for_the_device() -> None:
    case = make(64, [(1000, 16), (196, 16)], gathered=True).to("cuda")
    leaf = case.logits.clone().requires_grad_()
    for debug in ("default", "error"):
        torch.cuda.set_sync_debug_mode(debug)
        try:
            backward(case, leaf, "uniform", "triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_streams_do_not_share_counters() -> None:
    case = make(2048, [(1000, 16)], seed=3).to("cuda")
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(
                    multi_head_kl(
                        case.logits, case.heads, case.ids, case.logp, weights=case.weights, implementation="triton"
                    )
                )
    torch.cuda.synchronize()
    assert all(torch.equal(result, results[0]) for result in results)


def test_more_than_two_to_the_31_logits() -> None:
    """The last rows' gradient is what it is in a batch of their own: both batches are powers of two."""
    batch, case = 2**16, make(2, [(2**15 + 8, 16)], dtype=torch.bfloat16).to("cuda")
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    logits = torch.zeros(batch, case.logits.shape[1], dtype=torch.bfloat16, device="cuda")
    logits[-2:] = case.logits
    rows = torch.zeros(batch, dtype=torch.int64, device="cuda")
    rows[-1] = 1
    gradients = []
    for inputs, chosen in ((logits, rows), (case.logits, torch.arange(2, device="cuda"))):
        leaf = inputs.requires_grad_()
        losses = multi_head_kl(
            leaf, case.heads, case.ids, case.logp, rows=chosen, weights=case.weights, implementation="triton"
        )
        gradients.append(torch.autograd.grad(losses.sum(), leaf)[0][-2:])
    assert torch.equal(gradients[0] * batch, gradients[1] * 2)
