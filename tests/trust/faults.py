"""Faults that the tests must see: in which function, what is there, what a slip would make of it, and the tests that
should fail.

The function is found in any file (see locating.py), so that a fault survives its move. Tests are names of files in any
folder of tests/, followed by pytest's `-k` if needed. A fault in csrc/ is built into the extension, except for
test_host_kernel.py, which compiles the kernels itself.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    where: str
    old: str
    new: str
    tests: str

    def selection(self) -> tuple[list[str], str]:
        """The names of the test files, and which of their tests to run (pytest's -k); empty for all."""
        files, _, chosen = self.tests.partition(" -k ")
        return files.split(), chosen

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.old.split())[:70]} -> {' '.join(self.new.split())[:70]}"


HOST = "test_host_kernel.py -k not arm"
INTERPRETED = "test_triton.py -k interpreted"
COMPILED_GUARDS, PYTHON_GUARDS = "test_guards.py -k compiled", "test_guards.py -k python"

FAULTS = [
    # ------------------------------------------------------------ the arithmetic of an element
    Fault("Ema", "weight < Real(0.5)", "weight < Real(0.75)", HOST),
    Fault("Ema", "student == teacher ||", "", HOST),
    Fault("nearest_bfloat16", "(bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16", "bits >> 16", HOST),
    Fault("nearest_bfloat16", "0x7FFFu + ((bits >> 16) & 1u)", "0x8000u", HOST),
    Fault("narrow<Half>", "magnitude < (113u << 23)", "magnitude < (112u << 23)", HOST),
    Fault("is_finite", "(x.bits & 0x7C00u) != 0x7C00u", "(x.bits & 0x7800u) != 0x7800u", HOST),
    Fault("Philox", "kRounds = 10", "kRounds = 9", HOST),
    Fault("Random", "element & 1 ? 16 : 0", "element & 1 ? 0 : 16", HOST),
    Fault("EmaRule", "return weight.is_zero()", "return false", HOST),
    Fault("EmaRule", "replaces_nonfinite && !is_finite(teacher) ? s : t", "t", HOST),
    Fault("narrow_stochastic<BFloat16>", "x != x ? 0x7FC0u :", "", "test_rounding.py"),
    # ------------------------------------------------------------ the CPU kernel
    Fault(
        "update_chunk", "i < chunk.numel; ++i) teacher[i] = rule(", "i + 1 < chunk.numel; ++i) teacher[i] = rule(", HOST
    ),
    Fault("update_block", "uint64_t{first} * sizeof(uint16_t)", "uint64_t{first}", HOST),
    Fault("update_block", "chunk.extra + first, random", "chunk.extra, random", HOST),
    Fault("update_block", "if (chunk.flags & kCastToHalf)", "if (!(chunk.flags & kCastToHalf))", HOST),
    Fault("update_block", "!is_finite(student[i])", "!is_finite(teacher[i])", HOST),
    Fault("update_piece", "skipped += !is_finite(student[i])", "skipped += is_finite(student[i])", HOST),
    Fault("update_cpu", "i * arguments.n_teachers", "i", HOST),
    Fault("swap_chunk", "std::swap(teacher[i], student[i])", "teacher[i] = student[i]", HOST),
    # ------------------------------------------------------------ the CUDA kernels
    Fault("for_elements", "chunk.flags & kVector16 ? chunk.numel / kVector : 0", "chunk.numel / kVector", HOST),
    Fault("for_elements", "vectors * kVector + threadIdx.x", "vectors * kVector + threadIdx.x + 1", HOST),
    Fault("for_elements", "Constant<1>(), v * kVector", "Constant<1>(), v", HOST),
    Fault("update_piece", "random[from + i]", "random[from + i / 2]", HOST),
    Fault("update_piece", "kept >> (v * kN + i) & 1u", "kept >> i & 1u", HOST),
    Fault("update_piece", "load_teacher(records[k + 1].teacher)", "load_teacher(records[1].teacher)", HOST),
    Fault("draw_in_pairs", "random[1] = is_upper ? drawn : passed", "random[1] = drawn", HOST),
    Fault("swap_chunk", "store(chunk.student + offset, teacher);", "", HOST),
    Fault("update_general", "kSeveral ? int64_t{arguments.n_teachers} : 1", "1", HOST),
    # ------------------------------------------------------------ guards
    Fault("strided", "same(strides[i])", "(same(strides[i]) || true)", COMPILED_GUARDS),
    Fault("strided", "same(address(data))", "(same(address(data)) || true)", COMPILED_GUARDS),
    Fault("strided", "same(dtype)", "(same(dtype) || true)", COMPILED_GUARDS),
    Fault("same_name", "same(address(name)) ||", "same(address(name)) || true ||", COMPILED_GUARDS),
    Fault("same_fields", "(different[0] | different[1]) == 0", "true", "test_guards.py test_life.py"),
    Fault("find_entry", "key == name ? value : PyDict_GetItem(dict, name)", "value", "test_guards.py test_life.py"),
    Fault(
        "_record_tensors",
        "where, layout = (tensor.data_ptr(), tensor.is_neg()), tensor.stride()",
        "where = tensor.data_ptr(), tensor.is_neg()",
        PYTHON_GUARDS,
    ),
    Fault("_record_tensors", "tensor.dtype, tensor.device", "tensor.device", PYTHON_GUARDS),
    Fault("_record_tensors", "first_index.setdefault(id(tensor), i)", "i", PYTHON_GUARDS),
    # ------------------------------------------------------------ options
    Fault(
        "Options.__post_init__",
        '(*self.rules, ("buffers", self.buffers))',
        "self.rules",
        "test_pairing.py test_situations.py",
    ),
    Fault(
        "Options.__post_init__",
        '("nonfinite", Nonfinite), ("sync_buffers", SyncBuffers)',
        '("nonfinite", Nonfinite)',
        "test_distributed.py -k sync",
    ),
    Fault(
        "Options.__post_init__",
        "(value := getattr(self, name)) not in get_args(known)",
        "(value := getattr(self, name)) is None",
        "test_teacher.py -k modes",
    ),
    Fault(
        "Options.__post_init__",
        "self.backend and self.backend not in get_args(BackendName)",
        "False",
        "test_choosing.py",
    ),
    Fault("check_seed", "0 <= seed < 1 << 32", "0 <= seed", "test_situations.py"),
    Fault("make_options", "backend or _backend_from_environment()", "backend", "test_choosing.py"),
    Fault(
        "OptionAttribute.__set__",
        "replace(teacher.options, **{self._name: value})",
        "teacher.options",
        "test_teacher.py test_situations.py",
    ),
    # ------------------------------------------------------------ the chunk table
    Fault("build_table", "if rest:", "if rest > 1:", "test_chunks.py test_backends.py"),
    Fault("build_table", "sorted(ends, key=lambda end: -end[0])", "ends", "test_chunks.py"),
    Fault("build_table", "end.append(rest | code << 32)", "end.append(rest + 1 | code << 32)", "test_chunks.py"),
    Fault("build_table", "code if aligned else code & ~(VECTOR16 << 16)", "code", "test_chunks.py"),
    Fault(
        "_first_record",
        "teacher.element_size(), student.element_size()",
        "teacher.element_size(), teacher.element_size()",
        "test_chunks.py",
    ),
    Fault("_first_record", "addresses % 16", "addresses % 8", "test_chunks.py"),
    Fault("_first_record", "addresses |= extra", "pass", "test_chunks.py test_general.py"),
    Fault("_first_record", "| COPIED << 16", "", "test_general.py test_nonfinite.py"),
    Fault("elements_per_chunk", "// max(", "// min(", "test_chunks.py"),
    Fault("find_pair_code", "pair.teacher.dtype != pair.student.dtype or", "", "test_chunks.py"),
    # ------------------------------------------------------------ which pairs the kernels take
    Fault("why_ineligible", "if differ_in_strides(pair)", "if False", "test_chunks.py"),
    Fault("why_ineligible", "effective_strides(teacher) != effective_strides(cast)", "False", "test_guards.py -k copy"),
    Fault("why_ineligible", "extent(teacher) != teacher.numel()", "False", "test_chunks.py"),
    Fault(
        "why_reference",
        "len({(p.teacher.dtype, p.teacher.device, p.rule) for p in bundle}) > 1",
        "False",
        "test_general.py test_teacher.py test_life.py",
    ),
    Fault("why_reference", "p.teacher.device,", "", "test_staging.py"),
    Fault("why_reference", "len(bundle) < n_teachers or", "", "test_general.py test_teacher.py test_life.py"),
    Fault("build_work", "if not is_plain(table)", "if False", "test_situations.py -k mode"),
    Fault(
        "Plan._divide",
        "for bundle in rest for pair in bundle",
        "for bundle in rest[:1] for pair in bundle",
        "test_guards.py test_situations.py test_life.py",
    ),
    Fault("Plan._divide", 'options.nonfinite == "skip"', "False", "test_nonfinite.py"),
    Fault(
        "Plan._divide", "backends.choose(device, options.backend)", "backends.choose(device, None)", "test_choosing.py"
    ),
    Fault("Plan.__init__", 'if options.rounding == "nearest"', "if True", "test_rounding.py test_situations.py"),
    Fault("Plan.run", "if arguments.found_inf:", "if False:", "test_teacher.py test_functional.py"),
    # ------------------------------------------------------------ memory and pairs
    Fault(
        "_tensors_overlap", "starts[at - 1] + width > start", "starts[at - 1] + width >= start", "test_situations.py"
    ),
    Fault("_overlaps_itself", "stride <= reach", "stride < reach", "test_overlaps.py test_pairing.py"),
    Fault(
        "drop_ties_and_empties",
        "(memory_key(earlier.student), earlier.rule) != (memory_key(pair.student), pair.rule)",
        "earlier.rule != pair.rule",
        "test_overlaps.py test_pairing.py",
    ),
    Fault("drop_ties_and_empties", "earlier.group != pair.group", "False", "test_teacher.py"),
    Fault("drop_ties_and_empties", "and pair.whole is None", "", "test_distributed.py -k empty_shard"),
    Fault("check_overlaps", 'pair.rule == "swap"', "False", "test_overlaps.py test_swapping.py test_teacher.py"),
    Fault("check_overlaps", "span.written or other.written", "span.written and other.written", "test_overlaps.py"),
    Fault("named_tensors", "while tensors and all(", "while tensors and any(", "test_pairing.py"),
    Fault("named_tensors", "if part not in _WRAPPERS", "if part", "test_pairing.py test_guards.py"),
    Fault("requested_rule", "in options.rules:", "in reversed(options.rules):", "test_pairing.py test_guards.py"),
    Fault("requested_rule", "if is_buffer and", "if", "test_pairing.py"),
    Fault("default_rule", "or tensor.is_complex()", "", "test_chunks.py test_pairing.py"),
    Fault("_find_pair_fault", "or teacher.is_complex() != student.is_complex()", "", "test_pairing.py"),
    Fault("check_order", "not any(s.requires_grad", "not all(s.requires_grad", "test_situations.py"),
    Fault(
        "pair_modules",
        'if rule == "ema" and id(tensor) in state_owners',
        "if False",
        "test_pairing.py test_situations.py",
    ),
    Fault("pair_modules", "teachers[name] is not students[name]", "False", "test_sharing.py"),
    # ------------------------------------------------------------ the teacher
    Fault(
        "TeacherState.count_step", "not found_inf: self.step += 1", "not found_inf: self.step += 0", "test_teacher.py"
    ),
    Fault("TeacherState.count_step", "(found_inf == 0)", "(found_inf != 0)", "test_teacher.py"),
    Fault("TeacherState.count_step", "elif found_inf is None or not found_inf", "else", "test_teacher.py"),
    Fault("check_step_number", "or step < 0", "", "test_teacher.py test_situations.py"),
    Fault(
        "TeacherState.prepare_counters",
        "0 if self.skipped is None else self.skipped",
        "0",
        "test_teacher.py test_nonfinite.py",
    ),
    Fault("TeacherState.prepare_counters", "if on_device else self.step", "if False else self.step", "test_teacher.py"),
    Fault("TeacherState.shared_options", '"seed": self.seed,', "", "test_structure.py"),
    Fault("TeacherState.__getstate__", ', "low_precision": None', "", "test_teacher.py"),
    Fault(
        "StudentReference.__init__",
        "ref(student)",
        "lambda: student",
        "test_guards.py test_situations.py test_teacher.py",
    ),
    Fault("_update_locked", "_check_shared_options(first, state)", "pass", "test_situations.py"),
    Fault(
        "_update_locked",
        "any(state.low_precision is not None",
        "all(state.low_precision is not None",
        "test_teacher.py",
    ),
    Fault(
        "_update_locked",
        'first.known_step() if first.options.rounding == "stochastic" else None',
        "0",
        "test_teacher.py test_rounding.py",
    ),
    Fault(
        "TeacherLock.check_can_update", "if self.exchange is not None", "if False", "test_teacher.py test_swapping.py"
    ),
    Fault("EMANTeacher.train", "if mode else []", "if True else []", "test_teacher.py"),
    Fault("will_estimate", "norm.momentum is None", "True", "test_teacher.py"),
    Fault(
        "apply_keeping_dtype",
        "new if new.dtype == tensor.dtype else tensor.to(new.device)",
        "new",
        "test_situations.py",
    ),
    # ------------------------------------------------------------ swaps
    Fault("Exchange._leave_locked", "lost = self._restore_replaced_tensors()", "pass", "test_swapping.py"),
    Fault(
        "Exchange._run_pieces",
        "increment_versions(self._memory, self._plan.written)",
        "pass",
        "test_teacher.py test_swapping.py",
    ),
    Fault("Exchange._enter_locked", "except BaseException", "except Exception", "test_interrupts.py test_swapping.py"),
    Fault("Exchange._invalidate_caches", "torch.clear_autocast_cache()", "pass", "test_swapping.py"),
    Fault("Exchange.copy_teacher", "copy.detach().copy_(own)", "pass", "test_swapping.py"),
    Fault("Swapped.__del__", "self._exchange.leave()", "pass", "test_swapping.py"),
    Fault("reference.swaps", "teacher.clone()", "teacher", "test_swapping.py test_general.py"),
    # ------------------------------------------------------------ low-precision copies, the plan cache, arguments
    Fault("LowPrecisionCopy.refresh", "recorded != now or storage.expired()", "recorded != now", "test_teacher.py"),
    Fault("LowPrecisionCopy.mark_written", "versions[i] = masters[i]._version", "pass", "test_teacher.py"),
    Fault(
        "tensors_to_cast", "torch.float32 if is_norm and tensor.dtype != dtype else dtype", "dtype", "test_teacher.py"
    ),
    Fault("PlanCache._find", "cached.key == key and", "", "test_guards.py"),
    Fault("PlanCache._find", "self.plans.insert(0, self.plans.pop(i))", "pass", "test_guards.py"),
    Fault("PlanCache._add", "del self.plans[_MAX_PLANS:]", "pass", "test_guards.py"),
    Fault("PlanCache._add", "if other.key != cached.key or other.plan.staging is None", "", "test_staging.py"),
    Fault("PlanCache.find_or_make", "self._add(found[0])", "pass", "test_guards.py"),
    Fault("cache_of_networks", "networks.pop(key, None)", "pass", "test_guards.py"),
    Fault("check_found_inf", "(found_inf != 0).float()", "found_inf.float()", "test_teacher.py test_functional.py"),
    Fault("check_momentum", "0.0 <= momentum <= 1.0", "0.0 <= momentum", "test_teacher.py test_functional.py"),
    Fault("_materialize", "tensor = tensor.full_tensor()", "pass", "test_distributed.py -k norm"),
    Fault("_materialize", "if not is_plain(tensor)", "if False", "test_functional.py"),
    Fault("_materialize", ".resolve_conj().resolve_neg()", "", "test_situations.py"),
    Fault("_switch_modes", "module.train(mode)", "pass", "test_swapping.py"),
    Fault("_switch_modes", "call_all(restore)", "pass", "test_swapping.py"),
    Fault("uninterrupted", "call_all(map(_call, calls))", "[call() for call in calls]", "test_interrupts.py"),
    Fault("hold_locks", "call_all(releases)", "pass", "test_interrupts.py test_swapping.py"),
    # ------------------------------------------------------------ staging
    Fault(
        "Staging.__init__",
        "setdefault(memory_key(pair.student), pair)",
        "setdefault(id(pair), pair)",
        "test_staging.py",
    ),
    Fault("Staging.copy_students", "copy.stream.synchronize()", "pass", "test_staging.py"),
    Fault("Staging.copy_students", "arguments.found_inf = arguments.found_inf.cpu()", "pass", "test_staging.py"),
    Fault("_DeviceCopy.start", "self.stream.wait_stream(current)", "pass", "test_staging.py"),
    Fault("_DeviceCopy.start", "current.wait_stream(self.stream) host.copy_(", "host.copy_(", "test_staging.py"),
    Fault("_group_by_buffer", "left -= _aligned_bytes(pair)", "left -= pair.student.nbytes // 2", "test_staging.py"),
    Fault("_make_views", "extent(pair.teacher) == pair.teacher.numel()", "True", "test_staging.py"),
    # ------------------------------------------------------------ other systems and devices
    Fault("address_of", "<< 64", "", "test_mps.py"),
    Fault(
        "widest_float",
        "torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64",
        "torch.float64",
        "test_mps.py",
    ),
    Fault("prepare_counters", "on_device and device.type not in WITHOUT_FLOAT64", "on_device", "test_mps.py"),
    Fault("find_hidden", "folder != here and", "", "test_platforms.py"),
    # ------------------------------------------------------------ the other backends
    Fault("reference.run", "if place.group == 0 and", "if", "test_general.py"),
    Fault("reference.run", "new = torch.where(arguments.found_inf != 0, teacher, new)", "pass", "test_general.py"),
    Fault(
        "_lerp_on_cpu",
        "partial(torch.where, equal, student, teacher, out=teacher)",
        "int",
        "test_nonfinite.py test_backends.py",
    ),
    Fault("foreach.run", "elif weight == 0: continue", "", "test_nonfinite.py test_backends.py"),
    Fault(
        "pack_arguments", "arguments.step & 0xFFFFFFFF", "arguments.step & 0xFFFF", "test_rounding.py test_general.py"
    ),
    Fault(
        "triton_kernels._ema",
        "tl.where(near_teacher, weight, weight - 1.0)",
        "tl.where(near_teacher, weight, 1.0 - weight)",
        INTERPRETED,
    ),
    Fault("triton_kernels._update_chunk", "weight, at < numel", "weight, at <= numel", INTERPRETED),
    Fault("triton_kernels._update_rows", "flags & 2 != 0", "flags & 1 != 0", INTERPRETED),
    Fault("triton_kernels._update_rows", "// 8 + row.to(tl.uint64)", "// 8", INTERPRETED),
    Fault("triton_kernels.eman_update", "(4 if GENERAL is None else 4 * GENERAL[0])", "4", INTERPRETED),
    # ------------------------------------------------------------ schedules, and an optimizer's steps
    Fault("Cosine.__call__", "_clamp_max(step, self.steps)", "step", "test_schedules.py"),
    Fault("WarmUp.__call__", "(1 + step) / (10 + step)", "step / (10 + step)", "test_schedules.py"),
    Fault("pair_tensors", "[theirs[name] for name in mine]", "list(theirs.values())", "test_eager.py"),
    Fault("published_loop", "(1.0 - momentum)", "momentum", "test_main.py"),
    Fault(
        "tabulate_rounds",
        "times[LOOP][which] / times[method][which]",
        "times[LOOP][0] / times[method][0]",
        "test_main.py",
    ),
    Fault("_warn_if_layouts_differ", "cache.warned_of_layouts = True", "pass", "test_eager.py"),
    Fault("_warn_if_layouts_differ", "size > _NOTICEABLE_BYTES and ", "", "test_eager.py"),
    Fault("_bytes_read", "pair.group == 0 or not one_pass", "not one_pass", "test_plan.py"),
    Fault("Linear.__call__", "_clamp_max(step, self.steps)", "step", "test_schedules.py"),
    Fault("ExponentialWarmUp.__call__", "-(step + 1)", "-step", "test_schedules.py"),
    Fault("Average.__call__", "(step + 1), self.momentum", "(step + 1), 1.0", "test_schedules.py"),
    Fault("Offset.__call__", "step + self.steps", "step", "test_schedules.py"),
    Fault("InverseGamma.__call__", "* (since > 0)", "", "test_schedules.py"),
    Fault("CopyFirst.__call__", "step < self.updates", "step <= self.updates", "test_schedules.py"),
    Fault("_CountingHook", "steps <= self.start", "steps < self.start", "test_following.py"),
    Fault("_CountingHook.__call__", "steps += found_inf == 0", "steps += 1", "test_following.py"),
    Fault("_CountingHook.__call__", "self.start = 0", "pass", "test_following.py"),
    # ------------------------------------------------------------ other libraries' checkpoints
    Fault("identify", 'return Rank.STUDENT, "a student"', 'return Rank.PLAIN, "a student"', "test_checkpoints.py"),
    Fault("identify", "if _stored_at(parent, prefix, leaves, _MMENGINE_STUDENT)", "if False", "test_checkpoints.py"),
    Fault("_read_step", "and value >= 0", "", "test_checkpoints.py"),
    Fault("_pair_list", "if len(tensors) == len(own)", "if True", "test_checkpoints.py"),
    Fault("flatten_keys", 'value.keys() >= {"state", "param_groups"}', "False", "test_checkpoints.py"),
    Fault("_pair_joined", "tensors[path.removeprefix(mapping)] = value", "pass", "test_checkpoints.py"),
    Fault("load_ema_checkpoint", "found.step is None and needs_step(teacher.state)", "False", "test_checkpoints.py"),
    Fault("_find_unrecognised_averages", "any(map(names_average, keys))", "False", "test_checkpoints.py"),
    Fault("_find_unrecognised_averages", "if each in own", "if False", "test_checkpoints.py"),
    Fault("load_ema_checkpoint", 'state["_extra_state"] = torch.tensor(found.step)', "pass", "test_checkpoints.py"),
    # ------------------------------------------------------------ post-hoc EMA
    Fault(
        "solve_coefficients",
        "system[:n, :n], system[:n, n:], system[n:, :n] = cosines, scale, scale.T",
        "system[:n, :n], system[n, n] = cosines, 1",
        "test_profiles.py",
    ),
    Fault("_cosines", "torch.where(steps < other_steps, b, a)", "b", "test_profiles.py"),
    Fault("integrate_profile", "weights[0] = mass[0]", "pass", "test_profiles.py"),
    Fault(
        "gamma_of_half_life", "math.log1p(-half_life / step) - 1", "math.log1p(-half_life / step)", "test_profiles.py"
    ),
    Fault("add_up", "network is last", "network is combination.networks[0]", "test_synthesis.py -k counters"),
    Fault("add_up", "and name not in last.copied", "", "test_synthesis.py -k not_averaged"),
    Fault("_keep_variances_positive", "tensor.clamp_(min=0)", "pass", "test_synthesis.py -k variance"),
    Fault("select_networks", "network.step <= end", "True", "test_synthesis.py -k counters"),
    Fault("Snapshots._copy_to_host", "and id(own[name]) in parameters", "", "test_snapshots.py -k averages"),
    Fault(
        "Snapshots._copy_to_host",
        "tensor.full_tensor() if is_distributed(tensor) else tensor",
        "tensor",
        "test_snapshots.py -k rank_0",
    ),
    Fault(
        "Snapshots._copy_to_host", "teacher.state_dict()", "teacher.module.state_dict()", "test_snapshots.py -k swapped"
    ),
    Fault(
        "Snapshots.store_if_due",
        "self._calls < self._every - before % self._every",
        "False",
        "test_snapshots.py -k device",
    ),
    Fault("Snapshots._store", "if path not in existing", "if True", "test_snapshots.py -k resumed"),
    Fault("Snapshots.wait", "self._stored_step = None", "pass", "test_snapshots.py -k failed"),
    Fault("write_network", 'path.name + ".tmp"', "path.name", "test_snapshots.py -k killed"),
    Fault("_copy", "if not error >", "if True or error >", "test_snapshots.py -k hold"),
    Fault("_copy", 'tensor.to("cpu", copy=True)', 'tensor.to("cpu")', "test_snapshots.py -k continues"),
    Fault("_choose_superfluous", "min(steps[:-1]", "max(steps[:-1]", "test_snapshots.py -k keep"),
    # ------------------------------------------------------------ compiled graphs
    Fault("trace_networks", "[students[name] for name in names]", "[*students.values()]", "test_traced.py"),
    Fault("trace_teachers", "1 if found_inf is None else", "1 if True else", "test_traced.py"),
    Fault("_pair_once", 'pair.rule == "copy" for pair', "False for pair", "test_traced.py"),
    # ------------------------------------------------------------ several processes
    Fault("reshard", "module.reshard()", "pass", "test_distributed.py -k readme"),
    Fault("replace_by_shards", "offset=_shard_offset(pair.teacher)", "offset=0", "test_distributed.py -k bits"),
    Fault(
        "number_elements",
        "((numel if pair.whole is None else pair.whole) + 7) // 8 * 8",
        "numel",
        "test_general.py test_rounding.py",
    ),
    Fault(
        "_shard_offset",
        "shard = shard * size + coordinate",
        "shard = coordinate",
        "test_distributed.py -k shards_of_shards",
    ),
    Fault(
        "BufferSync._reduce",
        "self._flat[1].clone()",
        "dist.get_world_size(self.group)",
        "test_distributed.py -k statistics",
    ),
    # ------------------------------------------------------------ other libraries
    Fault("_average_tensors", "n_averaged.double()", "n_averaged.float()", "test_torch.py"),
    Fault("ModelEman.update", "max(step - 1, 0)", "step", "test_timm.py"),
    Fault("ModelEman.get_decay", "if since <= 0:", "if since < 0:", "test_timm.py"),
    Fault(
        "ModelEman.get_decay",
        "max(min(warm_up, self.decay), self.min_decay)",
        "min(warm_up, self.decay)",
        "test_timm.py",
    ),
    Fault(
        "update_momentum", "eman_update_(model_ema, model, m,", "eman_update_(model, model_ema, m,", "test_lightly.py"
    ),
    Fault("update_momentum", "model_ema.eval()", "pass", "test_lightly.py"),
    Fault("EMANWeightAveraging.__init__", "CopyFirst(momentum)", "momentum", "test_lightning.py"),
    Fault("EMANWeightAveraging.on_train_batch_end", "if self._stepped:", "if True:", "test_lightning.py"),
    Fault("EMANWeightAveraging.on_train_batch_end", "found_inf = None", "found_inf", "test_lightning.py"),
    Fault("EMANWeightAveraging.setup", ", -1", ", 99", "test_lightning.py"),
    Fault(
        "EMANWeightAveraging.on_load_checkpoint",
        'state["n_averaged"]}',
        'state["n_averaged"] + 1}',
        "test_lightning.py",
    ),
    Fault("_AverageTeacher.update_parameters", ", found_inf=self.found_inf", "", "test_lightning.py"),
    Fault(
        "EMANModel.step",
        "self.get_decay(self.optimization_step + 1)",
        "self.get_decay(self.optimization_step)",
        "test_diffusers.py",
    ),
    Fault("EMANModel.step", "not parameter.requires_grad for", "False for", "test_diffusers.py"),
    Fault("EMANTrainer._swapped", 'callback.evaluate_with == "teacher" and', "", "test_transformers.py"),
    Fault(
        "EMANCallback.on_train_begin",
        "self._load([folder, args.resume_from_checkpoint],",
        "str([folder],",
        "test_transformers.py",
    ),
    Fault(
        "EMANCallback.on_train_end",
        "args.load_best_model_at_end and state.best_model_checkpoint",
        "False",
        "test_transformers.py",
    ),
]
