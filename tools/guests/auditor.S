# auditor: keeps records in pages, checks every one of them each round, and reports any page that is not right.
#
# A page, in 32-bit words:
#   +0     counter: how many times it was written
#   +4     its own address
#   +8     the round of its last write
#   +256k  (k = 1..15) counter * GOLDEN ^ address of this word
#   +4092  the sum of all the words above
#
# In round r the pages i with (i + r) mod ratio = 0 are written. What a page must hold therefore follows from
# r and i alone, and those live in registers: no memory is trusted, so a page that is old but consistent
# shows. Pages between the words are left alone; the comparison from outside covers them.
#
#   H <round>                                       every `beat` rounds
#   LOST  <page> expected <address> got <address>   the record is not of this page (a zero page, say)
#   STALE <page> expected <counter> got <counter>   a consistent record, but of another round
#   TORN  <page> expected <word> got <word>         parts of different records
#   E <count>                                       every `beat` rounds, once there was an error
#
# A bad page is written anew after its line, so that each damage counts once; the first 64 have lines.
# Parameters: start= pages= ratio= beat=, flush=1, which empties the TLB in every round as an operating system
# does now and then (stock QEMU 7.2 under TCG loses writes to pages that stay in its TLB), and selftest=N, which damages three pages in round N itself, one in
# each way, and leaves through the debug exit port at the next beat. ratio=0 writes nothing after the start.

        .include "common32.inc"
        .set    GOLDEN, 0x9e3779b1              # 2^32 / golden ratio, odd: spreads a small counter over the word
        .set    STRIDE, 256
        .set    CHECKSUM, PAGE_SIZE - 4
        .set    LINES, 64                       # arbitrary: enough to see a pattern, few enough to stay readable

        .macro  take name, default              # a parameter into the variable of the same name
        mov     esi, offset name_\name
        mov     eax, \default
        call    parameter
        mov     [\name], eax
        .endm

guest:
        take    start, 0x100000
        take    pages, 1024
        take    ratio, 4
        take    beat, 64
        take    flush, 0
        take    selftest, 0
        mov     ebp, 1                          # EBP = round, from here on
        xor     esi, esi                        # ESI = errors found
        call    first_page
1:      call    expected
        call    write_page
        call    next_page
        jb      1b

round:
        mov     eax, [selftest]
        cmp     ebp, eax
        jne     1f
        test    eax, eax
        jz      1f
        call    damage
1:      cmp     dword ptr [flush], 0
        je      1f
        mov     eax, cr4                        # a change of PGE empties it, with paging off too
        xor     eax, 0x80
        mov     cr4, eax
1:      call    first_page
2:      call    check_page
        call    write_if_due
        call    next_page
        jb      2b
        call    heartbeat
        inc     ebp
        jmp     round

# first_page, next_page: ECX = page index, EDI = its address; carry is set while there are pages left.
first_page:
        xor     ecx, ecx
        mov     edi, [start]
        ret
next_page:
        inc     ecx
        add     edi, PAGE_SIZE
        cmp     ecx, [pages]
        ret

# expected: EAX = counter and EDX = round of the last write that page ECX must show before round EBP's writes.
expected:
        push    ebx
        mov     ebx, [ratio]
        test    ebx, ebx
        jz      8f
        mov     eax, ecx
        xor     edx, edx
        div     ebx
        push    eax                             # index / ratio
        lea     eax, [ecx + ebp - 1]
        xor     edx, edx
        div     ebx                             # (index + round - 1) / ratio
        mov     edx, eax
        imul    edx, ebx
        sub     edx, ecx
        pop     ebx
        sub     eax, ebx                        # the difference is the number of writes
        jnz     9f
        xor     edx, edx
9:      pop     ebx
        ret
8:      xor     eax, eax
        xor     edx, edx
        pop     ebx
        ret

# write_page: the record with counter EAX and round EDX into page EDI. Changes EAX, EBX, EDX.
write_page:
        push    ecx
        imul    ebx, eax, GOLDEN
        mov     [edi], eax
        mov     [edi + 4], edi
        mov     [edi + 8], edx
        add     edx, eax
        add     edx, edi
        mov     ecx, STRIDE
1:      lea     eax, [edi + ecx]
        xor     eax, ebx
        mov     [edi + ecx], eax
        add     edx, eax
        add     ecx, STRIDE
        cmp     ecx, PAGE_SIZE
        jb      1b
        mov     [edi + CHECKSUM], edx
        pop     ecx
        ret

write_if_due:
        mov     ebx, [ratio]
        test    ebx, ebx
        jz      1f
        lea     eax, [ecx + ebp]
        xor     edx, edx
        div     ebx
        test    edx, edx
        jnz     1f
        inc     ebp                             # what is due is what the next round expects
        call    expected
        dec     ebp
        call    write_page
1:      ret

# verify: are the words of page EDI those of counter EAX? If not, carry is set, EAX = expected, EBX = got.
verify:
        push    ecx
        imul    ebx, eax, GOLDEN
        mov     edx, [edi]
        add     edx, [edi + 4]
        add     edx, [edi + 8]
        mov     ecx, STRIDE
1:      lea     eax, [edi + ecx]
        xor     eax, ebx
        cmp     eax, [edi + ecx]
        jne     2f
        add     edx, eax
        add     ecx, STRIDE
        cmp     ecx, PAGE_SIZE
        jb      1b
        mov     eax, edx
        mov     ecx, CHECKSUM
        cmp     eax, [edi + CHECKSUM]
        jne     2f
        pop     ecx
        clc
        ret
2:      mov     ebx, [edi + ecx]
        pop     ecx
        stc
        ret

check_page:
        call    expected
        cmp     [edi + 4], edi
        jne     page_lost
        cmp     [edi], eax
        jne     page_other_counter
        cmp     [edi + 8], edx
        jne     page_other_round
        call    verify
        jc      page_torn
        ret
page_lost:
        mov     eax, edi
        mov     ebx, [edi + 4]
        mov     edx, offset text_lost
        jmp     report
page_other_round:
        mov     eax, edx
        mov     ebx, [edi + 8]
        jmp     page_torn
page_other_counter:
        push    eax
        mov     eax, [edi]
        call    verify                          # consistent in itself?
        pop     edx
        jc      page_torn
        mov     eax, edx
        mov     ebx, [edi]
        mov     edx, offset text_stale
        jmp     report
page_torn:
        mov     edx, offset text_torn
report:                                         # EDX = kind, EAX = expected, EBX = got
        inc     esi
        cmp     esi, LINES
        ja      1f
        push    esi
        mov     esi, edx
        call    put_text
        push    eax
        mov     eax, edi
        call    put_number
        mov     esi, offset text_expected
        call    put_text
        pop     eax
        call    put_number
        mov     esi, offset text_got
        call    put_text
        mov     eax, ebx
        call    put_number
        mov     al, '\n'
        call    put_character
        pop     esi
1:      call    expected
        call    write_page
        ret

heartbeat:
        mov     eax, ebp
        xor     edx, edx
        div     dword ptr [beat]
        test    edx, edx
        jnz     2f
        mov     al, 'H'
        mov     ebx, ebp
        call    put_figure
        test    esi, esi
        jz      1f
        mov     al, 'E'
        mov     ebx, esi
        call    put_figure
1:      mov     eax, [selftest]
        test    eax, eax
        jz      2f
        cmp     ebp, eax
        jb      2f
        mov     eax, esi
        mov     edx, DEBUG_EXIT
        out     dx, eax
2:      ret

# put_figure: the letter AL, a space, EBX and a newline.
put_figure:
        call    put_character
        mov     al, ' '
        call    put_character
        mov     eax, ebx
        call    put_number
        mov     al, '\n'
        jmp     put_character

# damage: page 1 becomes a zero page, page 2 an older record, page 3 gets one wrong word.
damage:
        mov     edi, [start]
        add     edi, PAGE_SIZE
        push    edi
        mov     ecx, PAGE_SIZE / 4
        xor     eax, eax
        rep stosd
        pop     edi
        add     edi, PAGE_SIZE
        mov     ecx, 2
        call    expected
        dec     eax
        call    write_page
        mov     edi, [start]
        xor     byte ptr [edi + 3 * PAGE_SIZE + 7 * STRIDE], 1
        ret

        .data
start:      .long 0
pages:      .long 0
ratio:      .long 0
beat:       .long 0
flush:      .long 0
selftest:   .long 0
name_start: .asciz "start="
name_pages: .asciz "pages="
name_ratio: .asciz "ratio="
name_beat:  .asciz "beat="
name_flush: .asciz "flush="
name_selftest: .asciz "selftest="
text_lost:  .asciz "LOST "
text_stale: .asciz "STALE "
text_torn:  .asciz "TORN "
text_expected: .asciz " expected "
text_got:   .asciz " got "
