"""Faults that the tests must see: where, what is there, what a slip would make of it, and the tests that should fail.

Tests are files under tests/, behind them pytest's `-k` if need be. A fault in csrc/ is built into the extension, but
for tests/test_host_kernel.py, which compiles the kernels itself.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    path: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.path}: {' '.join(self.old.split())[:70]} -> {' '.join(self.new.split())[:70]}"


MATH, CPU, CUDA = "csrc/ema_math.h", "csrc/eman_update_cpu.cpp", "csrc/eman_update.cuh"
WATCH_CPP, PLAN, PAIRING = "csrc/guards.cpp", "eman_kernels/plan.py", "eman_kernels/pairing.py"
STEP, DISTRIBUTED = "eman_kernels/step.py", "eman_kernels/distributed.py"
TEACHER, SWAP, MEMORY = "eman_kernels/teacher.py", "eman_kernels/swap.py", "eman_kernels/memory.py"
WATCH, LOW, TRITON = "eman_kernels/watch.py", "eman_kernels/low_precision.py", "eman_kernels/backends/triton_kernels.py"
KNOWN, CALL, REFERENCE = "eman_kernels/known.py", "eman_kernels/call.py", "eman_kernels/backends/reference.py"
FOREACH, EXTENSION, STAGING = (
    "eman_kernels/backends/foreach.py",
    "eman_kernels/backends/extension.py",
    "eman_kernels/staging.py",
)

FOLLOW, SCHEDULES, IN_GRAPH = "eman_kernels/follow.py", "eman_kernels/schedules.py", "eman_kernels/in_graph.py"
CHECKPOINTS, INTEGRATIONS = "eman_kernels/checkpoints.py", "eman_kernels/integrations"

HOST = "test_host_kernel.py"
INTERPRETED = "test_triton.py -k interpreted"
ELSEWHERE = "test_elsewhere.py"

FAULTS = [
    # ------------------------------------------------------------ the arithmetic of an element
    Fault(MATH, "near_teacher = weight < Real(0.5)", "near_teacher = weight < Real(0.75)", HOST),
    Fault(MATH, "(bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16", "bits >> 16", HOST),
    Fault(MATH, "bits + 0x7FFFu + ((bits >> 16) & 1u)", "bits + 0x8000u", HOST),
    Fault(MATH, "infinite_or_nan : magnitude < (113u << 23) ?", "infinite_or_nan : magnitude < (112u << 23) ?", HOST),
    Fault(MATH, "student == teacher || weight == Real(1)", "weight == Real(1)", HOST),
    Fault(MATH, "(x.bits & 0x7C00u) != 0x7C00u", "(x.bits & 0x7800u) != 0x7800u", HOST),
    Fault(MATH, "kRounds = 10", "kRounds = 9", HOST),
    Fault(MATH, "element & 1 ? 16 : 0", "element & 1 ? 0 : 16", HOST),
    Fault(MATH, "return weight.is_zero()", "return false", HOST),
    Fault(MATH, "replaces_nonfinite && !is_finite(teacher) ? s : t", "t", HOST),
    Fault(MATH, "x != x ? 0x7FC0u : (bits_of(x) + random)", "(bits_of(x) + random)", "test_rounding.py"),
    # ------------------------------------------------------------ the CPU kernel
    Fault(CPU, "i < chunk.numel; ++i) teacher[i] = rule(", "i + 1 < chunk.numel; ++i) teacher[i] = rule(", HOST),
    Fault(CPU, "chunk.extra + uint64_t{first} * sizeof(uint16_t)", "chunk.extra + uint64_t{first}", HOST),
    Fault(CPU, "skipped += !is_finite(student[i])", "skipped += is_finite(student[i])", HOST),
    Fault(CPU, "arguments.chunks + i * arguments.n_teachers", "arguments.chunks + i", HOST),
    Fault(CPU, "chunk.extra + first, random", "chunk.extra, random", HOST),
    Fault(CPU, "std::swap(teacher[i], student[i])", "teacher[i] = student[i]", HOST),
    Fault(CPU, "if (chunk.flags & kCastToHalf)", "if (!(chunk.flags & kCastToHalf))", HOST),
    Fault(CPU, "if (kSkips && !is_finite(student[i]))", "if (kSkips && !is_finite(teacher[i]))", HOST),
    # ------------------------------------------------------------ the CUDA kernels
    Fault(CUDA, "chunk.flags & kVector16 ? chunk.numel / kVector : 0", "chunk.numel / kVector", HOST),
    Fault(CUDA, "i = vectors * kVector + threadIdx.x", "i = vectors * kVector + threadIdx.x + 1", HOST),
    Fault(
        CUDA,
        "visit(Constant<kVector>(), Constant<1>(), v * kVector)",
        "visit(Constant<kVector>(), Constant<1>(), v)",
        HOST,
    ),
    Fault(CUDA, "(kN == 4 ? from & 4 : from) + i", "from + i / 2", HOST),
    Fault(CUDA, "kept >> i & 1u ? was.at[i]", "kept & 1u ? was.at[i]", HOST),
    Fault(CUDA, "store(chunk.student + offset, teacher);", "", HOST),
    Fault(CUDA, "int64_t{arguments.n_teachers} * blockIdx.x", "blockIdx.x", HOST),
    # ------------------------------------------------------------ the watch
    Fault(
        WATCH_CPP,
        "same(sizes[i]) && same(strides[i])",
        "same(sizes[i]) && (same(strides[i]) || true)",
        "test_watch.py -k compiled",
    ),
    Fault(WATCH_CPP, "same(address(data)) &&", "(same(address(data)) || true) &&", "test_watch.py -k compiled"),
    Fault(WATCH_CPP, "&& same(dtype) &&", "&& (same(dtype) || true) &&", "test_watch.py -k compiled"),
    Fault(
        WATCH_CPP,
        "return same(address(name)) || PyUnicode_Compare",
        "return same(address(name)) || true || PyUnicode_Compare",
        "test_watch.py -k compiled",
    ),
    Fault(WATCH_CPP, "key == name ? value : PyDict_GetItem(dict, name)", "value", "test_watch.py test_life.py"),
    Fault(
        WATCH,
        "where, layout = tensor.data_ptr(), tensor.stride()",
        "where = tensor.data_ptr()",
        "test_watch.py -k python",
    ),
    Fault(
        WATCH,
        "answers.append((where, shape, layout, tensor.dtype, tensor.device))",
        "answers.append((where, shape, layout, tensor.device))",
        "test_watch.py -k python",
    ),
    Fault(WATCH, "where: object = first.setdefault(id(tensor), i)", "where: object = i", "test_watch.py -k python"),
    # ------------------------------------------------------------ the plan
    Fault(PLAN, "if rest:\n            ends", "if rest > 1:\n            ends", "test_plan.py test_backends.py"),
    Fault(PLAN, "sizes = teacher.element_size(), student", "sizes = teacher.element_size(), teacher", "test_plan.py"),
    Fault(PLAN, "sorted(ends, key=lambda end: -end[0])", "ends", "test_plan.py"),
    Fault(PLAN, "end.append(rest | code << 32)", "end.append(rest + 1 | code << 32)", "test_plan.py"),
    Fault("eman_kernels/caches.py", "                module.train()\n", "                pass\n", "test_swap.py"),
    Fault(PLAN, "(addresses % 16 == 0) * VECTOR16", "(addresses % 8 == 0) * VECTOR16", "test_plan.py"),
    Fault(PLAN, "        addresses |= extra\n", "", "test_plan.py test_general.py"),
    Fault(
        DISTRIBUTED,
        "first += ((numel if pair.whole is None else pair.whole) + 7) // 8 * 8",
        "first += numel",
        "test_general.py test_rounding.py",
    ),
    Fault(PLAN, "dtype, teacher.dtype] | COPIED << 16", "dtype, teacher.dtype]", "test_general.py test_nonfinite.py"),
    Fault(PLAN, "if strides_of(teacher) != strides_of(student):", "if False:", "test_plan.py"),
    Fault(
        PLAN,
        "if cast is not None and strides_of(teacher) != strides_of(cast):",
        "if False:",
        "test_watch.py -k copy",
    ),
    Fault(PLAN, "if extent(teacher) != teacher.numel():", "if False:", "test_plan.py"),
    Fault(
        PLAN,
        "len({(p.teacher.dtype, p.teacher.device, p.rule) for p in bundle}) > 1",
        "False",
        "test_general.py test_teacher.py test_life.py",
    ),
    # ------------------------------------------------------------ memory and pairs
    Fault(MEMORY, "starts[at - 1] + width > start", "starts[at - 1] + width >= start", "test_situations.py"),
    Fault(
        MEMORY,
        "(place(known.student), known.rule) != (place(pair.student), pair.rule)",
        "known.rule != pair.rule",
        "test_plan.py test_pairing.py",
    ),
    Fault(MEMORY, "if stride <= reach:", "if stride < reach:", "test_plan.py test_pairing.py"),
    Fault(MEMORY, "if known.group != pair.group:", "if False:", "test_teacher.py"),
    Fault(MEMORY, 'pair.rule == "swap"),\n', "False),\n", "test_plan.py test_swap.py test_teacher.py"),
    Fault(PAIRING, "while tensors and all(name.startswith", "while tensors and any(name.startswith", "test_pairing.py"),
    Fault(
        PAIRING,
        "for pattern, rule in rules.items():\n        if",
        "for pattern, rule in reversed(rules.items()):\n        if",
        "test_pairing.py test_watch.py",
    ),
    Fault(PAIRING, 'if is_buffer and buffers != "ema" else', 'if buffers != "ema" else', "test_pairing.py"),
    Fault(PAIRING, "or teacher.is_complex() != student.is_complex()", "", "test_pairing.py"),
    Fault(
        PAIRING,
        "and not any(s.requires_grad for s in student)",
        "and not all(s.requires_grad for s in student)",
        "test_situations.py",
    ),
    Fault(PAIRING, 'if rule == "ema" and id(tensor) in states:', "if False:", "test_pairing.py test_situations.py"),
    # ------------------------------------------------------------ the teacher
    Fault(STEP, '"_step", step + 1', '"_step", step', "test_teacher.py"),
    Fault(STEP, "(found_inf == 0).to(step.device)", "(found_inf != 0).to(step.device)", "test_teacher.py"),
    Fault(TEACHER, "train(mode and sys._getframe(1).f_code is _UPDATE_BN)", "train(mode)", "test_teacher.py"),
    Fault(
        STEP,
        "if teacher is not first:\n            _check_shared(first, teacher)",
        "",
        "test_situations.py",
    ),
    Fault(
        STEP,
        "    if teacher._turn.exchange is not None:\n        raise",
        "    if False:\n        raise",
        "test_teacher.py test_swap.py",
    ),
    Fault(
        STEP,
        "any(teacher._copy is not None for teacher in teachers)",
        "all(teacher._copy is not None for teacher in teachers)",
        "test_teacher.py",
    ),
    Fault(
        STEP,
        'step = _known_step(first) if first.rounding == "stochastic" else None',
        "step = 0",
        "test_teacher.py test_rounding.py",
    ),
    Fault(
        TEACHER,
        "return new if new.dtype == tensor.dtype else tensor.to(new.device)",
        "return new",
        "test_situations.py",
    ),
    # ------------------------------------------------------------ swaps
    Fault(SWAP, "lost = self._give_back()", 'lost = ""', "test_swap.py"),
    Fault(SWAP, "        increment_versions(self._memory, self._plan.written)\n", "", "test_teacher.py test_swap.py"),
    Fault(
        SWAP,
        "        except BaseException:\n            self._leave()\n            raise\n\n    def _leave",
        "        except Exception:\n            self._leave()\n            raise\n\n    def _leave",
        "test_interrupts.py test_swap.py",
    ),
    Fault(SWAP, "        torch.clear_autocast_cache()\n", "", "test_swap.py"),
    Fault(
        REFERENCE,
        "partial(student.copy_, teacher.clone())",
        "partial(student.copy_, teacher)",
        "test_swap.py test_general.py",
    ),
    # ------------------------------------------------------------ copies, plans that are known, calls
    Fault(LOW, "if was != now or storage.expired()", "if was != now", "test_teacher.py"),
    Fault(LOW, "            versions[i] = masters[i]._version\n", "            pass\n", "test_teacher.py"),
    Fault(LOW, "torch.float32 if is_norm and tensor.dtype != dtype else dtype", "dtype", "test_teacher.py"),
    Fault(KNOWN, "followed.options == options and", "", "test_watch.py"),
    Fault(KNOWN, "        del self.plans[_PLANS:]\n", "", "test_watch.py"),
    Fault(CALL, "(found_inf != 0).float()", "found_inf.float()", "test_teacher.py test_functional.py"),
    Fault(CALL, "0.0 <= momentum <= 1.0:", "0.0 <= momentum:", "test_teacher.py test_functional.py"),
    Fault("eman_kernels/caches.py", "                call_all(modes)\n", "                pass\n", "test_swap.py"),
    Fault(
        "eman_kernels/backends/interrupts.py",
        "call_all(map(_call, calls))",
        "[call() for call in calls]",
        "test_interrupts.py",
    ),
    Fault("eman_kernels/interrupts.py", "        call_all(release)\n", "        pass\n", "test_interrupts.py"),
    # ------------------------------------------------------------ teachers elsewhere
    Fault(STAGING, "copy.stream.synchronize()", "pass", ELSEWHERE),
    Fault(STAGING, "        self.stream.wait_stream(current)\n", "", ELSEWHERE),
    Fault(STAGING, "                current.wait_stream(self.stream)\n", "", ELSEWHERE),
    Fault(STAGING, "left -= _bytes(pair)", "left -= pair.student.nbytes // 2", ELSEWHERE),
    Fault(STAGING, "setdefault(place(pair.student), pair)", "setdefault(id(pair), pair)", ELSEWHERE),
    Fault(STAGING, "call.found_inf = call.found_inf.cpu()", "pass", ELSEWHERE),
    Fault(STAGING, "extent(pair.teacher) == pair.teacher.numel()", "True", ELSEWHERE),
    Fault(KNOWN, "if o.options != followed.options or not isinstance(o.plan, StagedPlan)", "", ELSEWHERE),
    Fault(PLAN, "{(p.teacher.dtype, p.teacher.device, p.rule)", "{(p.teacher.dtype, p.rule)", ELSEWHERE),
    # ------------------------------------------------------------ the other backends
    Fault(
        REFERENCE,
        "if place.group == 0 and arguments.skipped is not None",
        "if arguments.skipped is not None",
        "test_general.py",
    ),
    Fault(REFERENCE, "new = torch.where(arguments.found_inf != 0, teacher, new)", "pass", "test_general.py"),
    Fault(
        FOREACH,
        "partial(torch.where, where, student, teacher, out=teacher)",
        "int",
        "test_nonfinite.py test_backends.py",
    ),
    Fault(FOREACH, "        elif weight == 0:\n            continue\n", "", "test_nonfinite.py test_backends.py"),
    Fault(EXTENSION, "arguments.step & 0xFFFFFFFF", "arguments.step & 0xFFFF", "test_rounding.py test_general.py"),
    Fault(
        TRITON,
        "tl.where(near_teacher, weight, weight - 1.0)",
        "tl.where(near_teacher, weight, 1.0 - weight)",
        INTERPRETED,
    ),
    Fault(
        TRITON,
        "_update_elements(teacher + at, student + at, weight, at < numel,",
        "_update_elements(teacher + at, student + at, weight, at <= numel,",
        INTERPRETED,
    ),
    Fault(TRITON, "flags & 2 != 0", "flags & 1 != 0", INTERPRETED),
    Fault(TRITON, "// 8 + row.to(tl.uint64)", "// 8", INTERPRETED),
    Fault(TRITON, "(4 if GENERAL is None else 4 * GENERAL[0])", "4", INTERPRETED),
    # ------------------------------------------------------------ schedules, and an optimizer's steps
    Fault(SCHEDULES, "(1 + step) / (10 + step)", "step / (10 + step)", "test_schedules.py"),
    Fault(SCHEDULES, "self.min_decay) * (since > 0)", "self.min_decay)", "test_schedules.py"),
    Fault(SCHEDULES, "copied = step < self.updates", "copied = step <= self.updates", "test_schedules.py"),
    Fault(FOLLOW, "(self.steps <= self.start)", "(self.steps < self.start)", "test_follow.py"),
    Fault(FOLLOW, "(found_inf.reshape(()) == 0).long()", "1", "test_follow.py"),
    Fault(FOLLOW, "self.start = 0 if first.step else self.start", "pass", "test_follow.py"),
    # ------------------------------------------------------------ other libraries' checkpoints
    Fault(CHECKPOINTS, "return 2, Recognised", "return 1, Recognised", "test_checkpoints.py"),
    Fault(CHECKPOINTS, 'state["_extra_state"] = torch.tensor(found.step)', "pass", "test_checkpoints.py"),
    Fault(CHECKPOINTS, "if len(tensors) != len(names)", "if False", "test_checkpoints.py"),
    # ------------------------------------------------------------ compiled graphs
    Fault(IN_GRAPH, "[students[name] for name in names]", "[*students.values()]", "test_compile.py"),
    Fault(IN_GRAPH, "1 if found_inf is None else", "1 if True else", "test_compile.py"),
    Fault(IN_GRAPH, 'pair.rule == "copy" for pair', "False for pair", "test_compile.py"),
    # ------------------------------------------------------------ several processes
    Fault(DISTRIBUTED, "module.reshard()", "pass", "test_distributed.py -k readme"),
    Fault(DISTRIBUTED, "offset=_offset(pair.teacher)", "offset=0", "test_distributed.py -k bits"),
    Fault(
        DISTRIBUTED,
        "self._flat /= self._flat[1].clone()",
        "self._flat /= dist.get_world_size(self.group)",
        "test_distributed.py -k statistics",
    ),
    Fault(
        DISTRIBUTED,
        "shard = shard * size + coordinate",
        "shard = coordinate",
        "test_distributed.py -k shards_of_shards",
    ),
    # ------------------------------------------------------------ other libraries
    Fault(f"{INTEGRATIONS}/torch.py", "n_averaged.double()", "n_averaged.float()", "integrations/test_torch.py"),
    Fault(f"{INTEGRATIONS}/timm.py", "max(step - 1, 0)", "step", "integrations/test_timm.py"),
    Fault(f"{INTEGRATIONS}/timm.py", "updates=update_after_step + 1", "updates=1", "integrations/test_timm.py"),
    Fault(
        f"{INTEGRATIONS}/lightly.py",
        "eman_update_(model_ema, model, m,",
        "eman_update_(model, model_ema, m,",
        "integrations/test_lightly.py",
    ),
    Fault(f"{INTEGRATIONS}/lightly.py", "model_ema.eval()", "pass", "integrations/test_lightly.py"),
    Fault(f"{INTEGRATIONS}/lightning.py", "if self._stepped:", "if True:", "integrations/test_lightning.py"),
    Fault(
        f"{INTEGRATIONS}/lightning.py",
        '{"_extra_state": state["n_averaged"]}',
        '{"_extra_state": state["n_averaged"] + 1}',
        "integrations/test_lightning.py",
    ),
    Fault(
        f"{INTEGRATIONS}/lightning.py",
        "self.update(model, found_inf=self.found_inf)",
        "self.update(model)",
        "integrations/test_lightning.py",
    ),
    Fault(
        f"{INTEGRATIONS}/diffusers.py",
        "self.get_decay(self.optimization_step + 1)",
        "self.get_decay(self.optimization_step)",
        "integrations/test_diffusers.py",
    ),
    Fault(
        f"{INTEGRATIONS}/diffusers.py", "not parameter.requires_grad for", "False for", "integrations/test_diffusers.py"
    ),
    Fault(
        f"{INTEGRATIONS}/transformers.py",
        "self.swap_back() if mode else self._swap(model)",
        "pass",
        "integrations/test_transformers.py",
    ),
    Fault(
        f"{INTEGRATIONS}/transformers.py",
        'self._load([folder, args.resume_from_checkpoint], "begins at the resumed model")',
        "pass",
        "integrations/test_transformers.py",
    ),
    Fault(
        f"{INTEGRATIONS}/transformers.py",
        "        if args.load_best_model_at_end and state.best_model_checkpoint:\n",
        "        if False:\n",
        "integrations/test_transformers.py",
    ),
    Fault(f"{INTEGRATIONS}/lightning.py", "CopyFirst(momentum)", "momentum", "integrations/test_lightning.py"),
    Fault(CALL, "tensor = tensor.full_tensor()", "pass", "test_distributed.py -k norm"),
    Fault(CALL, "    if not is_plain(tensor):\n", "    if False:\n", "test_functional.py"),
    Fault(PLAN, "        if not is_plain(records):\n", "        if False:\n", "test_situations.py -k mode"),
]
