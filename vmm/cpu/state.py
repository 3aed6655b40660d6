"""The vCPU's state on the wire: QEMU's sections "cpu" version 12 and "cpu_common" version 1.

The tables give names, order and widths: 1817 bytes, and 34 for the subsection that TCG always sends.
`extract` and `fill` move the values between them and the C structure `pf_cpu_state`, which carries what the
engine has. The rest exists only for KVM: `KEPT` lists it; such values are kept beside the engine and given
back unchanged.

Sources: QEMU 7.2 target/i386/machine.c and hw/core/cpu-common.c; bytes recorded from stock.
"""

from __future__ import annotations

import copy
from typing import Any

from vmm.errors import VMStateError
from vmm.vmstate import Description, Field, Subsection, Values

__all__ = ["CPU_COMMON_DESCRIPTION", "CPU_DESCRIPTION", "KEPT", "extract", "fill", "reset_values"]

POLL_CONTROL = "cpu/poll_control_msr"
FPU_POINTERS = "cpu/fpop_ip_dp"
MISC_ENABLE = "cpu/msr_ia32_misc_enable"
TSC_KHZ = "cpu/tsc_khz"

MISC_ENABLE_DEFAULT = 1

HF_LMA = 1 << 14
HF_CS64 = 1 << 15
HF_SMM = 1 << 19
CR0_PG = 1 << 31
EFER_LMA = 1 << 10


def _u64(*names: str) -> tuple[Field, ...]:
    return tuple(Field(name, "uint64") for name in names)


FPREG = Description("fpreg", 0, 0, (Field("mant", "uint64"), Field("exp", "uint16")))
SEGMENT = Description(
    "segment",
    1,
    1,
    (
        Field("selector", "uint32"),
        Field("base", "uint64"),
        Field("limit", "uint32"),
        Field("flags", "uint32"),
    ),
)
XMM_REG = Description("xmm_reg", 1, 1, _u64("_q_ZMMReg[0]", "_q_ZMMReg[1]"))
YMMH_REG = Description("ymmh_reg", 1, 1, _u64("_q_ZMMReg[2]", "_q_ZMMReg[3]"))
MTRR_VAR = Description("mtrr_var", 1, 1, _u64("base", "mask"))


def _optional(name: str, *fields: Field) -> Subsection:
    return Subsection(Description(name, 1, 1, fields), lambda values: name in values)


CPU_DESCRIPTION = Description(
    "cpu",
    12,
    12,
    (
        Field("env.regs", "uint64", 16),
        *_u64("env.eip", "env.eflags"),
        Field("env.hflags", "uint32"),
        Field("env.fpuc", "uint16"),
        Field("env.fpus_vmstate", "uint16"),
        Field("env.fptag_vmstate", "uint16"),
        Field("env.fpregs_format_vmstate", "uint16"),
        Field("env.fpregs", "struct", 8, FPREG),
        Field("env.segs", "struct", 6, SEGMENT),
        *(Field(f"env.{name}", "struct", struct=SEGMENT) for name in ("ldt", "tr", "gdt", "idt")),
        Field("env.sysenter_cs", "uint32"),
        *_u64("env.sysenter_esp", "env.sysenter_eip"),
        *_u64("env.cr[0]", "env.cr[2]", "env.cr[3]", "env.cr[4]"),
        Field("env.dr", "uint64", 8),
        Field("env.a20_mask", "int32"),
        Field("env.mxcsr", "uint32"),
        Field("env.xmm_regs[0]", "struct", 16, XMM_REG),
        *_u64("env.efer", "env.star", "env.lstar", "env.cstar", "env.fmask", "env.kernelgsbase"),
        Field("env.smbase", "uint32"),
        *_u64("env.pat"),
        Field("env.hflags2", "uint32"),
        *_u64("env.vm_hsave", "env.vm_vmcb", "env.tsc_offset", "env.intercept"),
        Field("env.intercept_cr_read", "uint16"),
        Field("env.intercept_cr_write", "uint16"),
        Field("env.intercept_dr_read", "uint16"),
        Field("env.intercept_dr_write", "uint16"),
        Field("env.intercept_exceptions", "uint32"),
        Field("env.v_tpr", "uint8"),
        Field("env.mtrr_fixed", "uint64", 11),
        Field("env.mtrr_deftype", "uint64"),
        Field("env.mtrr_var", "struct", 8, MTRR_VAR),
        Field("env.interrupt_injected", "int32"),
        Field("env.mp_state", "uint32"),
        Field("env.tsc", "uint64"),
        Field("env.exception_nr", "int32"),
        *(
            Field(f"env.{name}", "uint8")
            for name in ("soft_interrupt", "nmi_injected", "nmi_pending", "has_error_code")
        ),
        Field("env.sipi_vector", "uint32"),
        *_u64("env.mcg_cap", "env.mcg_status", "env.mcg_ctl"),
        Field("env.mce_banks", "uint64", 40),
        *_u64("env.tsc_aux", "env.system_time_msr", "env.wall_clock_msr", "env.xcr0", "env.xstate_bv"),
        Field("env.xmm_regs[1]", "struct", 16, YMMH_REG),
    ),
    (
        _optional(POLL_CONTROL, *_u64("env.poll_control_msr")),
        _optional(FPU_POINTERS, Field("env.fpop", "uint16"), *_u64("env.fpip", "env.fpdp")),
        _optional(MISC_ENABLE, *_u64("env.msr_ia32_misc_enable")),
        _optional(TSC_KHZ, Field("env.tsc_khz", "int64")),
    ),
)
"""QEMU's "cpu", of its optional subsections those that stock sends for qemu64 under TCG or KVM.

QEMU takes version 11 too, which nothing sends any more.
"""

CPU_COMMON_DESCRIPTION = Description(
    "cpu_common", 1, 1, (Field("halted", "uint32"), Field("interrupt_request", "uint32"))
)

KEPT: Values = {
    "env.fpregs_format_vmstate": 0,
    "env.interrupt_injected": -1,
    "env.mp_state": 0,
    "env.tsc": 0,
    "env.exception_nr": -1,
    "env.soft_interrupt": 0,
    "env.nmi_injected": 0,
    "env.nmi_pending": 0,
    "env.has_error_code": 0,
    "env.sipi_vector": 0,
    "env.xstate_bv": 0,
    POLL_CONTROL: {"env.poll_control_msr": 0},
}
"""What the engine has no place for, with its values at reset."""

_KEPT_SUBSECTIONS = (POLL_CONTROL, FPU_POINTERS, TSC_KHZ)

_NUMBERS = (
    "eip", "eflags", "hflags", "hflags2", "fpuc", "fpus_vmstate", "fptag_vmstate", "sysenter_cs",
    "sysenter_esp", "sysenter_eip", "a20_mask", "mxcsr", "efer", "star", "lstar", "cstar", "fmask",
    "kernelgsbase", "smbase", "pat", "vm_hsave", "vm_vmcb", "tsc_offset", "intercept", "intercept_cr_read",
    "intercept_cr_write", "intercept_dr_read", "intercept_dr_write", "intercept_exceptions", "v_tpr",
    "mtrr_deftype", "mcg_cap", "mcg_status", "mcg_ctl", "tsc_aux", "system_time_msr", "wall_clock_msr",
    "xcr0",
)  # fmt: skip
_ARRAYS = ("regs", "dr", "mtrr_fixed", "mce_banks")
_TABLES = ("ldt", "tr", "gdt", "idt")
_CR = (0, 2, 3, 4)
_PAIRS = (
    ("env.fpregs", "fpregs", "mant", "exp"),
    ("env.xmm_regs[0]", "xmm", "_q_ZMMReg[0]", "_q_ZMMReg[1]"),
    ("env.xmm_regs[1]", "ymmh", "_q_ZMMReg[2]", "_q_ZMMReg[3]"),
    ("env.mtrr_var", "mtrr_var", "base", "mask"),
)


def _segment(raw: Any) -> Values:
    return {"selector": raw.selector, "base": raw.base, "limit": raw.limit, "flags": raw.flags}


def extract(raw: Any, kept: Values) -> Values:
    """The values of a `struct pf_cpu_state`, completed by what was kept for it."""
    values: Values = {f"env.{name}": getattr(raw, name) for name in _NUMBERS}
    values |= {f"env.{name}": list(getattr(raw, name)) for name in _ARRAYS}
    values |= {f"env.cr[{i}]": raw.cr[i] for i in _CR}
    values["env.segs"] = [_segment(each) for each in raw.segs]
    values |= {f"env.{name}": _segment(getattr(raw, name)) for name in _TABLES}
    for name, member, low, high in _PAIRS:
        values[name] = [{low: each.low, high: each.high} for each in getattr(raw, member)]
    if raw.msr_ia32_misc_enable != MISC_ENABLE_DEFAULT:
        values[MISC_ENABLE] = {"env.msr_ia32_misc_enable": raw.msr_ia32_misc_enable}
    return values | _copy(kept)


def _copy(kept: Values) -> Values:
    """Numbers and tables of numbers; a deepcopy takes ten times as long, while the guest stands still."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in kept.items()}


def fill(raw: Any, values: Values) -> Values:
    """Writes values into a `struct pf_cpu_state` and returns those to be kept beside it.

    Raises VMStateError when the state cannot be had here: in system management mode, which needs a second
    address space, in long mode without paging, or with the x87 registers in QEMU's old format.
    """
    hflags = values["env.hflags"]
    if hflags & HF_SMM:
        raise VMStateError("System management mode is not supported", "cpu.env.hflags", got=f"{hflags:#x}")
    paging = values["env.cr[0]"] & CR0_PG and values["env.efer"] & EFER_LMA
    if (hflags & HF_LMA and not paging) or (hflags & HF_CS64 and not hflags & HF_LMA):
        raise VMStateError("Long mode does not fit CR0 and EFER", "cpu.env.hflags", got=f"{hflags:#x}")
    if values["env.fpregs_format_vmstate"] != 0:
        raise VMStateError(
            "Unsupported x87 register format",
            "cpu.env.fpregs_format_vmstate",
            expected=0,
            got=values["env.fpregs_format_vmstate"],
        )
    for name in _NUMBERS:
        setattr(raw, name, values[f"env.{name}"])
    for name in _ARRAYS:
        setattr(raw, name, values[f"env.{name}"])
    for i in _CR:
        raw.cr[i] = values[f"env.cr[{i}]"]
    for name in _TABLES:
        setattr(raw, name, values[f"env.{name}"])
    raw.segs = values["env.segs"]
    for name, member, low, high in _PAIRS:
        setattr(raw, member, [(each[low], each[high]) for each in values[name]])
    misc = values.get(MISC_ENABLE)
    raw.msr_ia32_misc_enable = misc["env.msr_ia32_misc_enable"] if misc else MISC_ENABLE_DEFAULT
    kept = {name: values[name] for name in KEPT if name not in _KEPT_SUBSECTIONS}
    kept |= {name: values[name] for name in _KEPT_SUBSECTIONS if name in values}
    return _copy(kept)


def reset_values(cpuid_version: int) -> Values:
    """The state after power-on or reset, as stock's `x86_cpu_reset` has it; EDX holds the CPU's signature."""
    data = {"base": 0, "limit": 0xFFFF, "flags": 0x9300, "selector": 0}
    table = data | {"flags": 0}
    zeros = dict.fromkeys((f"env.{name}" for name in _NUMBERS), 0)
    return {
        **zeros,
        "env.regs": [0, 0, cpuid_version, *[0] * 13],
        "env.eip": 0xFFF0,
        "env.eflags": 2,
        "env.hflags": 0x40,  # ADDSEG
        "env.hflags2": 0x101,  # GIF, VGIF
        "env.fpuc": 0x37F,
        "env.fpregs": [{"mant": 0, "exp": 0} for _ in range(8)],
        "env.segs": [
            data | {"selector": 0xF000, "base": 0xFFFF0000, "flags": 0x9B00} if i == 1 else dict(data)
            for i in range(6)
        ],
        "env.ldt": data | {"flags": 0x8200},
        "env.tr": data | {"flags": 0x8B00},
        "env.gdt": dict(table),
        "env.idt": dict(table),
        "env.cr[0]": 0x60000010,
        "env.cr[2]": 0,
        "env.cr[3]": 0,
        "env.cr[4]": 0,
        "env.dr": [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400],
        "env.a20_mask": -1,
        "env.mxcsr": 0x1F80,
        "env.xmm_regs[0]": [{"_q_ZMMReg[0]": 0, "_q_ZMMReg[1]": 0} for _ in range(16)],
        "env.xmm_regs[1]": [{"_q_ZMMReg[2]": 0, "_q_ZMMReg[3]": 0} for _ in range(16)],
        "env.smbase": 0x30000,
        "env.pat": 0x0007040600070406,
        "env.mtrr_fixed": [0] * 11,
        "env.mtrr_var": [{"base": 0, "mask": 0} for _ in range(8)],
        "env.mcg_cap": 0x100010A,
        "env.mcg_ctl": 0xFFFFFFFFFFFFFFFF,
        "env.mce_banks": [0xFFFFFFFFFFFFFFFF if i % 4 == 0 else 0 for i in range(40)],
        "env.xcr0": 1,
        **copy.deepcopy(KEPT),
    }
