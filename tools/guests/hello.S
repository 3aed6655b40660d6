# hello: prints one line and leaves through the debug exit port with `code` (the process exits 2 * code + 1).

        .include "common32.inc"

guest:
        mov     esi, offset greeting
        call    put_text
        mov     esi, offset name_code
        xor     eax, eax
        call    parameter
        mov     edx, DEBUG_EXIT
        out     dx, eax
        mov     esi, offset after               # shown only by a machine whose exit port does not end the run
        call    put_text
1:      hlt
        jmp     1b

        .data
greeting:   .asciz "Hello from the guest\n"
after:      .asciz "Still here after the exit port\n"
name_code:  .asciz "code="
