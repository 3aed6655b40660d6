/*
 * The library's entry points for guests that are not x86. Defined here, so that the linker leaves their
 * 500 objects in the archive; uc_open() refuses anything but x86 because these are never reached.
 */
#include <stdlib.h>

#define ABSENT(name)                                                                                               \
    void name(void);                                                                                               \
    void name(void)                                                                                                \
    {                                                                                                              \
        abort();                                                                                                   \
    }
#define ABSENT_REGS(target) ABSENT(reg_read_##target) ABSENT(reg_write_##target)
#define ABSENT_TARGET(target) ABSENT(uc_init_##target) ABSENT_REGS(target)

ABSENT_TARGET(aarch64)
ABSENT_TARGET(arm)
ABSENT_TARGET(m68k)
ABSENT_TARGET(mips)
ABSENT_TARGET(mips64)
ABSENT_TARGET(mips64el)
ABSENT_TARGET(mipsel)
ABSENT_TARGET(ppc)
ABSENT_TARGET(ppc64)
ABSENT_TARGET(riscv32)
ABSENT_TARGET(riscv64)
ABSENT_TARGET(s390x)
ABSENT_TARGET(sparc)
ABSENT_TARGET(sparc64)
ABSENT_TARGET(tricore)
