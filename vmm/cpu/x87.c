/*
 * The constants of the x87 as the rounding control wants them. Unicorn 2.1.4 always loads the nearest value;
 * a CPU, and stock QEMU since 5.1, rounds them from a longer one: in the other modes a guest would find
 * another pi after a migration than before. Intel SDM volume 2, FLD1/FLDL2T/FLDL2E/FLDPI/FLDLG2/FLDLN2/FLDZ.
 */
#include "engine_private.h"

#define FPREG_BYTES 16

enum { NEAREST = 0, DOWN = 1, UP = 2, TOWARDS_ZERO = 3 };

/* A constant, the nearest one, was just loaded into ST0: what its significand lacks when rounded down or up. */
static void round_st0(void *env, int down, int up)
{
    unsigned top = AT(uint32_t, env, ENV_FPSTT) & 7;
    uint64_t *significand = &AT(uint64_t, env, ENV_FPREGS + top * FPREG_BYTES);

    switch (AT(uint16_t, env, ENV_FPUC) >> 10 & 3) {
    case DOWN:
    case TOWARDS_ZERO: /* all of them are positive */
        *significand += down;
        break;
    case UP:
        *significand += up;
        break;
    default:
        break;
    }
}

#define WRAP_CONSTANT(name, down, up)                                                                              \
    void __real_##name(void *env);                                                                                 \
    void __wrap_##name(void *env);                                                                                 \
    void __wrap_##name(void *env)                                                                                  \
    {                                                                                                              \
        __real_##name(env);                                                                                        \
        round_st0(env, down, up);                                                                                  \
    }

WRAP_CONSTANT(helper_fldl2t_ST0_x86_64, 0, 1)
WRAP_CONSTANT(helper_fldl2e_ST0_x86_64, -1, 0)
WRAP_CONSTANT(helper_fldpi_ST0_x86_64, -1, 0)
WRAP_CONSTANT(helper_fldlg2_ST0_x86_64, -1, 0)
WRAP_CONSTANT(helper_fldln2_ST0_x86_64, -1, 0)
