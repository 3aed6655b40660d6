# prober: touches one page at a time with pauses between, and notes what each touch cost, by the time stamp counter.
#
# It fills `pages` pages from `start` on (a power of two; each page begins with its own address plus one), prints
# 'B', and then walks over them for ever in an order without neighbours. At `log` stand, as 32-bit words: the
# number of touches, then from log + 4096 on a ring of 65536 times { page index, ticks }. 'X' tells of a page that
# does not hold what it must. What is touched between two readings of the log at a source and at a destination
# was touched at the destination. Parameters: start= pages= log= pause= (ticks).

        .include "common32.inc"
        .set    RING, 65536

        .macro  take name, default
        mov     esi, offset name_\name
        mov     eax, \default
        call    parameter
        mov     [\name], eax
        .endm

guest:
        take    start, 0x400000
        take    pages, 16384
        take    log, 0x100000
        take    pause, 100000
        mov     edi, [start]
        mov     ecx, [pages]
1:      lea     eax, [edi + 1]
        mov     [edi], eax
        add     edi, PAGE_SIZE
        dec     ecx
        jnz     1b
        mov     edi, [log]
        mov     dword ptr [edi], 0
        mov     al, 'B'
        call    put_character
        xor     ebp, ebp                        # EBP = touches
        xor     ecx, ecx                        # ECX = page index
probe:
        imul    ecx, ecx, 0x19660d              # a full period over any power of two
        add     ecx, 0x3c6ef35f
        mov     eax, [pages]
        dec     eax
        and     ecx, eax
        mov     edi, ecx
        shl     edi, 12
        add     edi, [start]
        rdtsc
        mov     esi, eax
        mov     ebx, [edi]                      # the touch
        rdtsc
        sub     eax, esi                        # EAX = ticks
        dec     ebx
        cmp     ebx, edi
        jne     wrong
note:   mov     edx, ebp
        and     edx, RING - 1
        mov     edi, [log]
        mov     [edi + edx * 8 + PAGE_SIZE], ecx
        mov     [edi + edx * 8 + PAGE_SIZE + 4], eax
        inc     ebp
        mov     [edi], ebp
        rdtsc
        mov     esi, eax
1:      rdtsc
        sub     eax, esi
        cmp     eax, [pause]
        jb      1b
        jmp     probe
wrong:  push    eax
        mov     al, 'X'
        call    put_character
        pop     eax
        jmp     note

        .data
start:      .long 0
pages:      .long 0
log:        .long 0
pause:      .long 0
name_start: .asciz "start="
name_pages: .asciz "pages="
name_log:   .asciz "log="
name_pause: .asciz "pause="
