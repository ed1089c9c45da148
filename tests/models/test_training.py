"""The common training loop: equal to the bit across interruptions, and never a broken checkpoint."""

import csv
import math
import signal
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from turnaround.models.tiny import training
from turnaround.models.tiny.training import (
    Run,
    Settings,
    checkpoints,
    common_options,
    from_8_bits,
    load_checkpoint,
    pack,
    prepare,
    run_options,
    to_8_bits,
)

SETTINGS = Settings(seed=3, lr=1e-2, steps=10, warmup=2, decay=0.9)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Python's own answer to Ctrl-C, which a shell takes away from what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.SiLU(), nn.Linear(16, 4))


def fit_noise(net: nn.Module, stop_at: int | None = None):
    """A loss that draws from numpy's and torch's generators; asks to stop as Ctrl-C does."""

    def step_loss(rng, step):
        x = torch.from_numpy(rng.standard_normal((8, 4))).float()
        if step + 1 == stop_at:
            signal.raise_signal(signal.SIGINT)
        noise = torch.randn(8, 4)
        return {
            "fit": (net(x) - x.flip(1) + 0.1 * noise).square().mean(),
            "size": net(x).pow(2).mean(),
        }

    return step_loss


def trained(folder: Path, settings: Settings = SETTINGS, stop_at: int | None = None) -> Run:
    net = small_net()
    run = Run(net, settings, folder, device="cpu")
    assert run.fit(fit_noise(net, stop_at)) == (stop_at is None)
    return run


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_interrupted_run_has_the_same_bits_as_an_uninterrupted_one(tmp_path):
    whole = trained(tmp_path / "whole")
    half = trained(tmp_path / "slices", stop_at=5)
    assert half.step == 5
    torch.manual_seed(99)  # whatever another process did to the generators
    rest = trained(tmp_path / "slices")
    assert_same_bits(whole.weights, rest.weights)
    assert_same_bits(whole.average, rest.average)
    a, _ = load_checkpoint(checkpoints(tmp_path / "whole")[-1])
    b, _ = load_checkpoint(checkpoints(tmp_path / "slices")[-1])
    assert_same_bits(a, b)


def test_an_8_bit_average_leaves_the_trained_weights_exact(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole")
    monkeypatch.setattr(training, "MAX_FILES", 0)  # as if the network were too large
    trained(tmp_path / "slices", stop_at=5)
    saved, _ = load_checkpoint(checkpoints(tmp_path / "slices")[-1])
    assert "average_codes/0.weight" in saved and "average/0.weight" not in saved
    rest = trained(tmp_path / "slices")
    assert_same_bits(whole.weights, rest.weights)
    for name, average in whole.average.items():
        torch.testing.assert_close(rest.average[name], average, atol=1e-3, rtol=0)


def test_another_seed_gives_other_weights(tmp_path):
    a = trained(tmp_path / "a").weights
    b = trained(tmp_path / "b", Settings(seed=4, lr=1e-2, steps=10, warmup=2)).weights
    assert not torch.equal(a["0.weight"], b["0.weight"])


def test_a_picture_between_steps_changes_no_bit_and_sees_the_average(tmp_path):
    net, seen = small_net(), []
    run = Run(net, SETTINGS, tmp_path / "pictures", picture_minutes=0, device="cpu")

    def picture(step):
        torch.rand(7)
        seen.append(torch.equal(net[0].weight, run.average["0.weight"]) and not net.training)
        return torch.linspace(-1, 2, 3 * 4 * 5).view(3, 4, 5)

    assert run.fit(fit_noise(net), picture)
    assert_same_bits(run.weights, trained(tmp_path / "plain").weights)
    assert seen == [True] * 10 and net.training
    assert len(list((tmp_path / "pictures" / "pictures").glob("*.png"))) == 10


def test_average_equals_the_closed_form(tmp_path):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0]))

    net, history = One(), []
    settings = Settings(steps=4, lr=0.1, warmup=1, decay=0.1)

    def step_loss(_rng, _step):
        history.append(net.w.item())
        return {"w": net.w.sum()}

    run = Run(net, settings, tmp_path, device="cpu")
    run.fit(step_loss)
    w = [*history, net.w.item()]  # w[0] is the start
    d = [1 / 20, 2 / 21, 0.1, 0.1]  # (n + 1) / (n + 20), at most the decay
    expected = math.prod(d) * w[0] + sum(
        (1 - d[i]) * math.prod(d[i + 1 :]) * w[i + 1] for i in range(4)
    )
    assert run.average["w"].item() == pytest.approx(expected, abs=1e-6)
    # Adam's step is the learning rate when the gradient is constant; vectors do not decay.
    assert [b - a for a, b in zip(w, w[1:], strict=False)] == pytest.approx(
        [-settings.learning_rate(i) for i in range(4)], rel=1e-4
    )


def test_schedule_warms_up_linearly_and_ends_at_5_percent():
    s = Settings(lr=2.0, steps=101, warmup=20)
    rates = [s.learning_rate(i) for i in range(101)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[19] == rates[20] == 2.0
    assert rates[60] == pytest.approx((1 + 0.05) / 2 * 2.0)
    assert rates[100] == pytest.approx(0.05 * 2.0)
    assert sorted(rates[20:], reverse=True) == rates[20:]


def test_a_step_without_a_finite_loss_is_skipped(tmp_path):
    net = small_net()
    run = Run(net, SETTINGS, tmp_path, device="cpu")
    usual, before = fit_noise(net), {}

    def step_loss(rng, step):
        if step == 4:
            before.update({k: v.clone() for k, v in run.weights.items()})
        if step == 5:
            assert_same_bits(before, run.weights)
        factor = math.nan if step == 4 else 1.0
        return {k: v * factor for k, v in usual(rng, step).items()}

    assert run.fit(step_loss)
    assert (run.step, run.skipped, run.skipped_in_row) == (10, 1, 0)
    assert all(w.isfinite().all() for w in run.weights.values())


def test_a_broken_gradient_under_a_finite_loss_is_skipped(tmp_path):
    net = small_net()
    run = Run(net, Settings(steps=1), tmp_path, device="cpu")
    run.fit(lambda _rng, _step: {"root": (net[0].weight * 0).sum().sqrt()})  # slope 0 * inf
    assert run.skipped == 1


def test_ten_bad_steps_in_a_row_stop_with_a_sentence(tmp_path):
    net = small_net()
    run = Run(net, Settings(steps=100), tmp_path, device="cpu")
    with pytest.raises(ValueError, match="at step 10: 10 steps in a row .* in colour; lower --lr"):
        run.fit(lambda _rng, _step: {"colour": net(torch.full((1, 4), math.inf)).sum()})
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_stops_and_saves_before_the_minutes_are_over(tmp_path):
    now = [0.0]
    net = small_net()
    usual = fit_noise(net)
    run = Run(net, SETTINGS, tmp_path, minutes=1, device="cpu", clock=lambda: now[0])

    def step_loss(rng, step):
        now[0] += 14  # the fourth step ends at 56 s: a fifth would not fit
        return usual(rng, step)

    assert not run.fit(step_loss)
    assert run.step == 4 and now[0] <= 60
    assert checkpoints(tmp_path)[-1].name == "checkpoint-00000004"
    assert run.seconds == 56


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_lets_the_step_end_and_saves(tmp_path, kind):
    net, handlers = small_net(), [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    usual = fit_noise(net)
    run = Run(net, SETTINGS, tmp_path, device="cpu")

    def step_loss(rng, step):
        if step == 2:
            signal.raise_signal(kind)
        return usual(rng, step)

    assert not run.fit(step_loss)
    assert run.step == 3 and run.stopping == kind.name
    assert checkpoints(tmp_path)[-1].name == "checkpoint-00000003"
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers


def test_a_second_signal_acts_at_once(tmp_path):
    run = Run(small_net(), SETTINGS, tmp_path, device="cpu")

    def step_loss(_rng, _step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.fit(step_loss)


def test_a_half_written_checkpoint_is_removed_and_the_one_before_used(tmp_path):
    trained(tmp_path, stop_at=5)
    half = tmp_path / "checkpoint-00000009.tmp"
    half.mkdir()
    (half / "00.safetensors").write_bytes(b"half")
    assert Run(small_net(), SETTINGS, tmp_path, device="cpu").step == 5
    assert not half.exists()


def test_a_failed_write_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    trained(tmp_path, stop_at=5)
    before = {p: p.read_bytes() for p in tmp_path.glob("checkpoint-*/*")}

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(training, "flush", full_disk)
    with pytest.raises(OSError, match="no space"):
        trained(tmp_path)
    assert before == {p: p.read_bytes() for p in checkpoints(tmp_path)[-1].glob("*")}
    monkeypatch.undo()
    trained(tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-00000010"]


def test_between_two_whole_checkpoints_the_newer_counts(tmp_path):
    trained(tmp_path, stop_at=5)
    old = checkpoints(tmp_path)[-1].rename(tmp_path / "kept")
    trained(tmp_path)
    old.rename(tmp_path / "checkpoint-00000005")  # killed before the old one was deleted
    assert Run(small_net(), SETTINGS, tmp_path, device="cpu").step == 10


def test_files_stay_under_the_limit_and_tensors_run_over_several(tmp_path, monkeypatch):
    limit = 2**14  # one 16 x 1024 tensor alone has four times that
    monkeypatch.setattr(training, "MAX_BYTES", limit)
    monkeypatch.setattr(training, "MAX_FILES", 1000)
    net = nn.Sequential(nn.Linear(1024, 16), nn.LayerNorm(16))
    run = Run({"encoder": net}, Settings(steps=1), tmp_path, device="cpu")
    run.fit(lambda rng, _step: {"l": net(torch.ones(1, 1024)).pow(2).sum() + rng.random()})
    folder = checkpoints(tmp_path)[-1]
    sizes = [p.stat().st_size for p in folder.iterdir()]
    assert len(sizes) > 16 and max(sizes) <= limit
    tensors, state = load_checkpoint(folder)
    for name, w in run.weights.items():
        assert torch.equal(tensors[f"weight/{name}"], w)
        assert torch.equal(tensors[f"average/{name}"], run.average[name])
    assert state["step"] == 1 and state["settings"]["lr"] == 1e-3


@pytest.mark.parametrize(("millions", "exact"), [(8.2, True), (10, False)])
def test_ten_million_parameters_fit_eight_files_of_16_mib(millions, exact):
    # 60 layers; on the meta device, as sizes alone matter here.
    n = int(millions * 1e6 / 60)
    float32 = {
        f"{kind}/blocks.{i}.attention.weight": torch.empty(n, device="meta")
        for i in range(60)
        for kind in ("weight", "adam_exp_avg", "adam_exp_avg_sq")
    }
    small = {}
    for i in range(60):
        if exact:
            small[f"average/blocks.{i}.attention.weight"] = torch.empty(n, device="meta")
        else:
            codes = torch.empty(n, device="meta", dtype=torch.int8)
            small[f"average_codes/blocks.{i}.attention.weight"] = codes
            scales = torch.empty(math.ceil(n / 256), device="meta")
            small[f"average_scales/blocks.{i}.attention.weight"] = scales
    shards = pack(float32 | small, 16 * 2**20)
    assert len(shards) <= 8
    assert max(sum(t.nbytes for t in s.values()) for s in shards) < 16 * 2**20


def test_8_bit_differences_are_off_by_at_most_half_a_code():
    values = torch.randn(3, 211, generator=torch.Generator().manual_seed(0))
    values[0, :100] *= 1e-4
    codes, scales = to_8_bits(values)
    assert codes.dtype == torch.int8 and len(codes) == 633 and len(scales) == 3
    error = (from_8_bits(codes, scales) - values.view(-1)).abs()
    half_code = values.view(-1).abs().split(256)
    for e, block in zip(error.split(256), half_code, strict=True):
        assert e.max() <= block.max() / 254 * 1.001
    assert torch.equal(from_8_bits(*to_8_bits(torch.zeros(5))), torch.zeros(5))


def test_parameters_that_no_loss_has_reached_resume_without_moments(tmp_path):
    def step_loss_of(net, stop_at):
        def step_loss(rng, step):
            if step + 1 == stop_at:
                signal.raise_signal(signal.SIGTERM)
            x = torch.from_numpy(rng.standard_normal((2, 4))).float()
            y = net[0](x) if step < 6 else net(x)[:, :1]
            return {"a": (y - 1).square().mean()}

        return step_loss

    ends = []
    for folder, stops in (("whole", [None]), ("slices", [3, 8, None])):
        for stop_at in stops:
            net = small_net()
            run = Run(net, SETTINGS, tmp_path / folder, device="cpu")
            run.fit(step_loss_of(net, stop_at))
        ends.append(run.weights)
    assert_same_bits(*ends)


def test_export_writes_the_average_renamed_and_in_half_precision(tmp_path):
    run = trained(tmp_path)
    path = tmp_path / "out" / "net.safetensors"
    run.export(path, rename=lambda w: {f"net.{k}": v.t() for k, v in w.items()})
    weights = load_file(path)
    assert torch.equal(weights["net.0.weight"], run.average["0.weight"].t().half())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "10", "seed": "3"}
    run.export(path, dtype=torch.float32)
    assert_same_bits(load_file(path), run.average)
    assert list(path.parent.iterdir()) == [path]


def test_weights_beyond_half_precision_are_named(tmp_path):
    run = Run(small_net(), SETTINGS, tmp_path, device="cpu")
    run.average["3.bias"][0] = 1e6
    with pytest.raises(ValueError, match="Weight 3.bias does not fit .*bfloat16"):
        run.export(tmp_path / "net.safetensors")


def test_curve_holds_the_mean_of_each_term_and_forgets_lost_steps(tmp_path):
    ticks = count(0, 10)  # the clock goes on 10 s at every look: a row every second step or so
    net = small_net()
    run = Run(net, SETTINGS, tmp_path, device="cpu", clock=lambda: next(ticks))
    run.fit(lambda _rng, step: {"a": net[0].bias.sum() * 0 + step, "b": torch.tensor(2.0)})
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    steps = sorted({int(r["step"]) for r in rows})
    assert steps[-1] == 10 and len(steps) > 2
    first = {r["name"]: float(r["value"]) for r in rows if int(r["step"]) == steps[0]}
    mean = sum(range(steps[0])) / steps[0]
    assert (first["a"], first["b"], first["loss"]) == pytest.approx((mean, 2, mean + 2))
    with (tmp_path / "curve.csv").open("a") as file:
        file.write("12,99.0,loss,1.0\n")  # a slice that was killed before it saved
    Run(small_net(), SETTINGS, tmp_path, device="cpu")
    assert list(csv.DictReader((tmp_path / "curve.csv").open())) == rows


def test_another_seed_or_network_in_the_folder_is_refused(tmp_path):
    trained(tmp_path, stop_at=5)
    with pytest.raises(ValueError, match="has seed 3, not 4: choose another --folder"):
        Run(small_net(), Settings(seed=4), tmp_path, device="cpu")
    with pytest.raises(ValueError, match="of another network"):
        Run(nn.Sequential(nn.Linear(4, 17)), SETTINGS, tmp_path, device="cpu")


def test_a_finished_run_does_nothing_more(tmp_path):
    run = trained(tmp_path)
    before = {k: v.clone() for k, v in run.weights.items()}
    again = trained(tmp_path)
    assert_same_bits(before, again.weights)
    more = Settings(seed=3, lr=1e-2, steps=12, warmup=2, decay=0.9)  # a longer run may be asked for
    assert trained(tmp_path, more).step == 12


def test_matrices_decay_and_vectors_do_not(tmp_path):
    net = nn.Linear(2, 2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    settings = Settings(steps=1, lr=0.1, warmup=1, weight_decay=0.5)
    run = Run(net, settings, tmp_path, device="cpu")
    run.fit(lambda _rng, _step: {"nothing": (net.weight.sum() + net.bias.sum()) * 0})
    torch.testing.assert_close(net.weight.detach(), before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(net.bias.detach(), before["bias"])


def test_a_cpu_computes_in_float32(tmp_path):
    net, kinds = small_net(), set()
    run = Run(net, Settings(steps=1), tmp_path, device="cpu", compiled=True)

    def step_loss(_rng, _step):
        y = net(torch.ones(1, 4))
        kinds.add(y.dtype)
        return {"y": y.sum()}

    run.fit(step_loss)
    assert kinds == {torch.float32}


def test_common_options_build_a_run(tmp_path):
    parser = common_options("Trains.", steps=10, batch=2, lr=0.1)
    parser.add_argument("--size", type=int, default=8)
    args = parser.parse_args(
        ["--folder", str(tmp_path), "--seed", "5", "--minutes", "9", "--device", "cpu"]
        + ["--threads", str(torch.get_num_threads())]
    )
    prepare(args)
    run = Run(small_net(), Settings.of(args, warmup=3), **run_options(args))
    assert run.settings == Settings(seed=5, lr=0.1, steps=10, warmup=3)
    assert run.seconds_allowed == 540 and args.batch == 2 and run.device.type == "cpu"
