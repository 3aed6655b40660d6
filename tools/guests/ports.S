# ports: reads the serial port's line status for ever and prints 'B' after each `count` times.

        .include "common32.inc"

guest:
        mov     esi, offset name_count
        mov     eax, 10000
        call    parameter
        mov     ebx, eax
report:
        mov     ecx, ebx
        mov     edx, COM1_LINE_STATUS
1:      in      al, dx
        dec     ecx
        jnz     1b
        mov     al, 'B'
        call    put_character
        jmp     report

        .data
name_count: .asciz "count="
