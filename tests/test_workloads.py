"""Which networks, sizes and steps the benchmarks run on which device."""

from trm_fast.workloads import CASES, default_cases, plan


def planned(device_type):
    found = plan(default_cases(device_type), device_type=device_type)
    return [
        (c.name, c.config["forward_dtype"], c.config["batch_size"], step, c.policies)
        for c, step in found
    ]


def test_the_plan_of_a_cpu_ends():
    found = [one[:4] for one in planned("cpu")]
    for name in ("official", "attention"):
        for dtype in ("bfloat16", "float32"):
            assert {(name, dtype, 8, "train"), (name, dtype, 8, "inference")} < set(found)
            assert (name, dtype, 1, "inference") in found
            assert (name, dtype, 1, "train") not in found
    for dtype in ("bfloat16", "float32"):
        steps = [(64, "train"), (64, "inference"), (64, "solve"), (1, "solve")]
        assert [(b, s) for n, d, b, s in found if (n, d) == ("recipe", dtype)] == steps
    assert len(found) == len(set(found)) == 20


def test_the_plan_of_a_gpu_has_the_published_sizes():
    found = planned("cuda")
    assert {one[1] for one in found} == {"bfloat16"}
    assert {one[4] for one in found} == {("save", "light", "recompute")}
    sizes = [(768, "train"), (768, "solve"), (1, "solve"), (8, "solve"), (64, "solve")]
    for name in ("official", "attention"):
        assert [(b, s) for n, _, b, s, _ in found if n == name] == sizes
    assert ("maze", "bfloat16", 192, "train") in [one[:4] for one in found]
    assert [(b, s) for n, _, b, s, _ in found if n == "nano-trm"] == [
        *((768, "train"), (768, "solve"), (1, "solve")),
    ]
    assert "recipe" not in [one[0] for one in found]


def test_what_a_device_is_not_for_can_be_asked_for():
    maze = CASES["maze"]
    assert maze not in default_cases("cpu")
    assert [(c.config["batch_size"], s) for c, s in plan([maze], steps=["train", "solve"])] == [
        (1, "train"),
        (1, "solve"),
    ]
    ((case, _),) = plan([maze], steps=["train"], device_type="cuda")
    assert (case.model.total_len, case.model.L_cycles, case.model.batch_size) == (916, 4, 192)
    assert CASES["nano-trm"].model.total_len == 81
    recipe = plan([CASES["recipe"]], device_type="cuda")
    assert {c.config["batch_size"] for c, _ in recipe} == {64, 1}


def test_a_plan_can_be_narrowed():
    official = [CASES["official"]]
    assert [(c.config["batch_size"], s) for c, s in plan(official, ["float16"], [1, 3])] == [
        (1, "train"),
        (1, "inference"),
        (3, "train"),
        (3, "inference"),
    ]
    ((case, step),) = plan(official, ["float32"], steps=["train"])
    assert (case.model.batch_size, case.model.forward_dtype, step) == (8, "float32", "train")
    assert case.rounds == CASES["official"].rounds
    assert CASES["official"].of("float32", 1).rounds == 3 * case.rounds
