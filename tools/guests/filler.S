# filler: writes every page of [start, end) once, prints 'B' and halts: memory of a known size and content.
#
# Every 256th byte of a page gets the page's own address, so that no two pages are alike and none is zero;
# with zero=1 the same words get zeroes: pages that exist and hold nothing. Parameters: start= end= zero=.

        .include "common32.inc"
        .set    STRIDE, 256

guest:
        mov     esi, offset name_start
        mov     eax, 0x100000
        call    parameter
        mov     ebx, eax                        # EBX = page
        mov     esi, offset name_end
        mov     eax, 0x6400000
        call    parameter
        mov     ebp, eax                        # EBP = end
        mov     esi, offset name_zero
        xor     eax, eax
        call    parameter
        lea     esi, [eax - 1]                  # ESI = mask of what is written: all ones, or zero
        mov     al, 'A'
        call    put_character
page:
        mov     eax, ebx
        and     eax, esi
        lea     ecx, [ebx + PAGE_SIZE]
1:      mov     [ebx], eax
        add     ebx, STRIDE
        cmp     ebx, ecx
        jb      1b
        cmp     ebx, ebp
        jb      page
        mov     al, 'B'
        call    put_character
1:      hlt
        jmp     1b

        .data
name_start: .asciz "start="
name_end:   .asciz "end="
name_zero:  .asciz "zero="
