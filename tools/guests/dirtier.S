# dirtier: increments the first byte of every page of [start, end) in turn, for ever.
#
# It prints 'A' once and 'B' after each `rounds` rounds over the range. Whenever it stands still, walking
# upward, every page holds the same counter except one place where it drops by one, modulo 256: the rule
# by which QEMU's own migration test judges its guest. Parameters: start= end= rounds=, and pause=, how often it
# counts to nothing between two pages: 0, or what makes it slow.

        .include "common32.inc"

guest:
        mov     esi, offset name_start
        mov     eax, 0x100000
        call    parameter
        mov     ebx, eax                        # EBX = first page
        mov     esi, offset name_end
        mov     eax, 0x6400000
        call    parameter
        mov     ebp, eax                        # EBP = end
        mov     esi, offset name_rounds
        mov     eax, 64
        call    parameter
        push    eax
        mov     esi, offset name_pause
        xor     eax, eax
        call    parameter
        mov     edx, eax                        # EDX = pause between two pages
        pop     esi                             # ESI = rounds between two 'B'
        mov     al, 'A'
        call    put_character
report:
        mov     ecx, esi                        # ECX = rounds left
round:
        mov     edi, ebx
1:      inc     byte ptr [edi]
        mov     eax, edx
        test    eax, eax
        jz      3f
2:      dec     eax
        jnz     2b
3:
        add     edi, PAGE_SIZE
        cmp     edi, ebp
        jb      1b
        dec     ecx
        jnz     round
        mov     al, 'B'
        call    put_character
        jmp     report

        .data
name_start:  .asciz "start="
name_end:    .asciz "end="
name_rounds: .asciz "rounds="
name_pause:  .asciz "pause="
