# longmode: a guest in 64-bit mode whose page tables, GDT, IDT, TSS and stack all lie high in memory (24 MiB),
# and which keeps a known value in every part of the CPU's state that must survive a migration.
#
# After round r, and checked in every round:
#   RBP = r          R10 = r, counted by the breakpoint handler        R12 = 3 r     R13 = 5 r
#   R15 = 1 rotated left by r                                           FS:0 = a constant
#   XMMk, k = 0..7   low half r * (k + 1), high half r * ((k + 1) << 32), added by XMM(k+8)
#   ST0 = r, ST1 = pi, control word 0xf7f (truncate)                    MXCSR 0x7f80 (truncate)
#   page i of the working set: +0 count, +8 own address, +2048 ~count ^ address, +4088 count * GOLDEN ^ address
# Pages are written and checked as in auditor.S; all data is reached through 0xffff800000000000 + address.
#
#   L <round>                                     every `beat` rounds
#   LOST|STALE|TORN <page> expected <> got <>     as in auditor.S
#   REG <name> expected <> got <>                 a register that does not hold its value
#   X <vector> error <> at <rip> address <cr2>    an exception nobody asked for; the guest then leaves
#   E <count>                                     every `beat` rounds, once there was an error
# Parameters: start= pages= ratio= beat=, flush=1 (empties the TLB in every round, see auditor.S) and fault=N (6, 13, 14: raises that exception in round 3).

        .intel_syntax noprefix
        .set    COM1, 0x3f8
        .set    COM1_LINE_STATUS, 0x3fd
        .set    DEBUG_EXIT, 0xf4
        .set    PAGE_SIZE, 4096
        .set    HIGH, 0xffff800000000000
        .set    GOLDEN, 0x9e3779b97f4a7c15
        .set    FS_VALUE, 0x0123456789abcdef
        .set    FPU_CONTROL, 0xf7f              # all masked, 64-bit precision, truncate
        .set    MXCSR, 0x7f80                   # all masked, truncate
        .set    LINES, 64                       # arbitrary, as in auditor.S
        .set    STUB_BYTES, 16                  # set before its use: Intel syntax takes a later one for memory
        .set    MSR_EFER, 0xc0000080
        .set    MSR_FS_BASE, 0xc0000100

        .text
        .globl  _start
.ifdef MULTIBOOT
# For peers that load no ELF64: into long mode by the page tables and the GDT the guest has anyway.
        .code32
        .balign 4
        .long   0x1badb002, 0, -0x1badb002
_start:
        cld
        cli
        mov     esp, offset stack_top
        mov     esi, [ebx + 16]
        call    fill_page_tables
        mov     eax, cr4
        or      eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT
        mov     cr4, eax
        mov     eax, offset pml4
        mov     cr3, eax
        mov     ecx, MSR_EFER
        rdmsr
        or      eax, 0x100                      # LME
        wrmsr
        mov     eax, cr0
        or      eax, 0x80000001
        mov     cr0, eax
        lgdt    [gdt_pointer]
        ljmp    0x08, offset start64
.else
        .code64
_start:
        jmp     start64
.endif

# fill_page_tables: the first 4 GiB at 0 and at HIGH, in 2 MiB pages. Called in 32 and in 64 bits: these
# instructions have the same bytes and the same effect in both.
        .code32
fill_page_tables:
        mov     eax, offset pdpt + 3
        mov     edi, offset pml4
        mov     dword ptr [edi], eax
        mov     dword ptr [edi + 256 * 8], eax
        mov     edi, offset pdpt
        mov     eax, offset page_directories + 3
        mov     ecx, 4
1:      mov     dword ptr [edi], eax
        add     eax, PAGE_SIZE
        add     edi, 8
        sub     ecx, 1
        jnz     1b
        mov     edi, offset page_directories
        mov     eax, 0x83                       # present, writable, 2 MiB
        mov     ecx, 2048
1:      mov     dword ptr [edi], eax
        add     eax, 0x200000
        add     edi, 8
        sub     ecx, 1
        jnz     1b
        ret

        .code64
        .macro  take name, default
        lea     rdi, name_\name[rip]
        mov     rax, \default
        call    parameter
        mov     \name[rip], rax
        .endm

# check: unless RAX equals RCX, report register `name`.
        .macro  check name
        cmp     rax, rcx
        je      770f
        lea     rdx, 771f[rip]
        call    report_register
        jmp     770f
771:    .asciz  "\name"
770:
        .endm

start64:
        cld
        cli
        lea     rsp, stack_top[rip]
        mov     parameters[rip], rsi
        mov     ax, 0x10
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        call    fill_page_tables
        mov     rax, cr4
        or      eax, 0x620
        mov     cr4, rax
        mov     rax, cr0
        and     eax, 0xfffffff3                 # EM and TS off
        or      eax, 0x10022                    # WP, NE, MP
        mov     cr0, rax
        lea     rax, pml4[rip]
        mov     cr3, rax
        call    load_tables
        movabs  rax, HIGH
        lea     rcx, 1f[rip]
        add     rax, rcx
        jmp     rax                             # from here on at HIGH; RIP-relative data follows by itself
1:      lea     rsp, stack_top[rip]
        take    start, 0x2000000
        take    pages, 512
        take    ratio, 4
        take    beat, 64
        take    flush, 0
        take    fault, 0
        call    first_values
        call    first_page
2:      call    expected
        call    write_page
        call    next_page
        jb      2b

round:
        mov     rax, fault[rip]
        test    rax, rax
        jz      1f
        cmp     rbp, 3
        je      raise
1:      cmp     qword ptr flush[rip], 0
        je      1f
        mov     rax, cr3
        mov     cr3, rax
1:      call    step
        call    check_registers
        call    first_page
2:      call    check_page
        call    write_if_due
        call    next_page
        jb      2b
        call    heartbeat
        jmp     round

# load_tables: GDT, data segments, TSS and IDT; the gates' handlers are reached at HIGH.
load_tables:
        lea     rax, tss[rip]
        movabs  rcx, HIGH
        add     rax, rcx
        mov     rdx, rax                        # the TSS descriptor, from the address in RAX
        mov     word ptr gdt_tss[rip], 103
        mov     word ptr gdt_tss[rip + 2], ax
        shr     rdx, 16
        mov     byte ptr gdt_tss[rip + 4], dl
        mov     byte ptr gdt_tss[rip + 5], 0x89
        mov     byte ptr gdt_tss[rip + 7], dh
        shr     rdx, 16
        mov     dword ptr gdt_tss[rip + 8], edx
        lea     rdx, fault_stack_top[rip]
        add     rdx, rcx
        mov     tss[rip + 36], rdx              # IST1
        lea     rax, gdt[rip]
        add     rax, rcx
        mov     gdt_pointer[rip + 2], rax
        lgdt    gdt_pointer[rip]
        mov     ax, 0x18
        ltr     ax
        lea     rdi, idt[rip]
        lea     rdx, stubs[rip]
        add     rdx, rcx
        xor     ecx, ecx
1:      cmp     ecx, 3                          # the breakpoint has a handler of its own
        mov     r8, rdx
        jne     2f
        lea     r8, breakpoint[rip]
        movabs  rax, HIGH
        add     r8, rax
2:      mov     word ptr [rdi], r8w
        mov     dword ptr [rdi + 2], 0x00010008 # code segment, IST1
        mov     byte ptr [rdi + 5], 0x8e        # interrupt gate
        shr     r8, 16
        mov     word ptr [rdi + 6], r8w
        shr     r8, 16
        mov     dword ptr [rdi + 8], r8d
        add     rdi, 16
        add     rdx, STUB_BYTES
        inc     ecx
        cmp     ecx, 32
        jb      1b
        lea     rax, idt[rip]
        movabs  rcx, HIGH
        add     rax, rcx
        mov     idt_pointer[rip + 2], rax
        lidt    idt_pointer[rip]
        ret

# first_values: every register as after round 0.
first_values:
        xor     ebp, ebp
        xor     ebx, ebx                        # RBX = errors found
        xor     r10d, r10d
        xor     r12d, r12d
        xor     r13d, r13d
        mov     r15d, 1
        lea     rax, fs_page[rip]
        movabs  rcx, FS_VALUE
        mov     [rax], rcx
        mov     rdx, rax
        shr     rdx, 32
        mov     ecx, MSR_FS_BASE
        wrmsr
        fninit
        mov     word ptr scratch[rip], FPU_CONTROL
        fldcw   scratch[rip]
        fldpi
        fldz
        mov     dword ptr scratch[rip], MXCSR
        ldmxcsr scratch[rip]
        .irp    k, 0, 1, 2, 3, 4, 5, 6, 7
        mov     eax, \k + 1
        movq    xmm\k, rax
        .endr
        .macro  increments from, to
        movdqa  xmm\to, xmm\from
        pslldq  xmm\to, 12                      # (k + 1) << 32 in the high half
        por     xmm\to, xmm\from
        pxor    xmm\from, xmm\from
        .endm
        increments 0, 8
        increments 1, 9
        increments 2, 10
        increments 3, 11
        increments 4, 12
        increments 5, 13
        increments 6, 14
        increments 7, 15
        ret

# step: every register from round r to round r + 1.
step:
        inc     rbp
        int3                                    # R10
        add     r12, 3
        add     r13, 5
        rol     r15, 1
        paddq   xmm0, xmm8
        paddq   xmm1, xmm9
        paddq   xmm2, xmm10
        paddq   xmm3, xmm11
        paddq   xmm4, xmm12
        paddq   xmm5, xmm13
        paddq   xmm6, xmm14
        paddq   xmm7, xmm15
        fld1
        faddp
        ret

check_registers:
        mov     rax, rbp
        mov     rcx, r10
        check   r10
        lea     rax, [rbp + 2 * rbp]
        mov     rcx, r12
        check   r12
        lea     rax, [rbp + 4 * rbp]
        mov     rcx, r13
        check   r13
        mov     eax, 1
        mov     ecx, ebp
        rol     rax, cl
        mov     rcx, r15
        check   r15
        movabs  rax, FS_VALUE
        mov     rcx, fs:[0]
        check   fs
        .irp    k, 0, 1, 2, 3, 4, 5, 6, 7
        movdqu  scratch[rip], xmm\k
        imul    rax, rbp, \k + 1
        mov     rcx, scratch[rip]
        check   xmm\k
        imul    rax, rbp, \k + 1
        shl     rax, 32
        mov     rcx, scratch[rip + 8]
        check   xmm\k
        .endr
        stmxcsr scratch[rip]
        mov     ecx, scratch[rip]
        and     ecx, 0xffc0                     # without the sticky flags
        mov     eax, MXCSR
        check   mxcsr
        fnstcw  scratch[rip]
        movzx   ecx, word ptr scratch[rip]
        mov     eax, FPU_CONTROL
        check   fcw
        fld     st(0)
        fistp   qword ptr scratch[rip]
        mov     rcx, scratch[rip]
        mov     rax, rbp
        check   st0
        fldpi
        fcomip  st, st(2)
        setne   cl                              # 1 if pi is another number now, or none
        setp    al
        or      cl, al
        movzx   ecx, cl
        xor     eax, eax
        check   st1
        ret

# report_register: RDX = name, RAX = expected, RCX = got.
report_register:
        inc     rbx
        cmp     rbx, LINES
        ja      1f
        push    rsi
        push    rdi
        lea     rdi, text_register[rip]
        call    put_text
        mov     rdi, rdx
        call    put_text
        call    put_expected_got
        pop     rdi
        pop     rsi
1:      ret

put_expected_got:
        lea     rdi, text_expected[rip]
        call    put_text
        mov     rdi, rax
        call    put_number
        lea     rdi, text_got[rip]
        call    put_text
        mov     rdi, rcx
        call    put_number
        mov     dil, '\n'
        jmp     put_character

# first_page, next_page: R9 = page index, R8 = its address at HIGH; carry is set while there are pages left.
first_page:
        xor     r9d, r9d
        movabs  r8, HIGH
        add     r8, start[rip]
        ret
next_page:
        inc     r9
        add     r8, PAGE_SIZE
        cmp     r9, pages[rip]
        ret

# expected: RAX = how many times page R9 was written up to round RBP.
expected:
        push    rcx
        push    rdx
        xor     eax, eax
        mov     rcx, ratio[rip]
        test    rcx, rcx
        jz      1f
        mov     rax, r9
        xor     edx, edx
        div     rcx
        mov     rsi, rax
        lea     rax, [r9 + rbp]
        xor     edx, edx
        div     rcx
        sub     rax, rsi
1:      pop     rdx
        pop     rcx
        ret

write_page:                                     # RAX = count, R8 = page
        mov     [r8], rax
        mov     [r8 + 8], r8
        mov     rcx, rax
        not     rcx
        xor     rcx, r8
        mov     [r8 + 2048], rcx
        movabs  rcx, GOLDEN
        imul    rcx, rax
        xor     rcx, r8
        mov     [r8 + 4088], rcx
        ret

# write_if_due: writes page R9 if its count grows in this round, which is after check_page compared the old one.
write_if_due:
        call    expected
        cmp     rax, [r8]
        jne     write_page
        ret

check_page:
        dec     rbp                             # what round RBP - 1 left
        call    expected
        inc     rbp
        mov     rcx, [r8 + 8]
        cmp     rcx, r8
        jne     page_lost
        mov     rcx, [r8 + 2048]
        not     rcx
        xor     rcx, r8                         # the count that the middle of the page has
        lea     rdx, text_torn[rip]
        cmp     rcx, [r8]
        jne     page_bad
        movabs  rsi, GOLDEN
        imul    rsi, rcx
        xor     rsi, r8
        cmp     rsi, [r8 + 4088]
        jne     page_bad
        lea     rdx, text_stale[rip]
        cmp     rcx, rax
        jne     page_bad
        ret
page_lost:
        push    rax
        lea     rdx, text_lost[rip]
        mov     rax, r8
        call    report_page
        pop     rax
        jmp     write_page
page_bad:
        push    rax
        call    report_page
        pop     rax
        jmp     write_page

report_page:                                    # RDX = kind, R8 = page, RAX = expected, RCX = got
        inc     rbx
        cmp     rbx, LINES
        ja      1f
        mov     rdi, rdx
        call    put_text
        movabs  rdi, HIGH
        neg     rdi
        add     rdi, r8
        call    put_number
        call    put_expected_got
1:      ret

heartbeat:
        mov     rax, rbp
        xor     edx, edx
        div     qword ptr beat[rip]
        test    rdx, rdx
        jnz     1f
        lea     rdi, text_beat[rip]
        mov     rax, rbp
        call    put_figure
        test    rbx, rbx
        jz      1f
        lea     rdi, text_errors[rip]
        mov     rax, rbx
        call    put_figure
1:      ret
put_figure:
        call    put_text
        mov     rdi, rax
        call    put_number
        mov     dil, '\n'
        jmp     put_character

# raise: the exception that was asked for by fault=.
raise:
        cmp     rax, 6
        jne     1f
        ud2
1:      cmp     rax, 13
        jne     1f
        mov     ax, 0xfff8                      # beyond the GDT
        mov     ds, ax
1:      movabs  rax, 0xffff900000001230
        mov     rax, [rax]

# The entries of the exceptions, each of STUB_BYTES: an error code if the CPU pushed none, the vector.
        .balign STUB_BYTES
stubs:
        .set    vector, 0
        .rept   32
        .balign STUB_BYTES
        .if     (vector != 8) && (vector != 17) && ((vector < 10) || (vector > 14))
        push    0
        .endif
        push    vector
        jmp     unexpected
        .set    vector, vector + 1
        .endr
        .balign STUB_BYTES

breakpoint:
        inc     r10
        iretq

unexpected:                                     # on the stack: vector, error code, RIP
        lea     rdi, text_exception[rip]
        call    put_text
        mov     rdi, [rsp]
        call    put_number
        lea     rdi, text_error_code[rip]
        call    put_text
        mov     rdi, [rsp + 8]
        call    put_number
        lea     rdi, text_at[rip]
        call    put_text
        mov     rdi, [rsp + 16]
        call    put_number
        lea     rdi, text_address[rip]
        call    put_text
        mov     rdi, cr2
        call    put_number
        mov     dil, '\n'
        call    put_character
        mov     eax, [rsp]
        mov     edx, DEBUG_EXIT
        out     dx, eax
1:      hlt
        jmp     1b

# parameter: RAX = the number after the word at RDI ("name="), or RAX as it was. Changes RCX, RDX, RSI, R8, R9.
parameter:
        mov     rsi, parameters[rip]
        test    rsi, rsi
        jz      9f
1:      cmp     byte ptr [rsi], 0
        je      9f
        mov     r8, rsi
        mov     r9, rdi
2:      mov     dl, [r9]
        test    dl, dl
        jz      4f
        cmp     dl, [r8]
        jne     3f
        inc     r8
        inc     r9
        jmp     2b
3:      cmp     byte ptr [rsi], 0
        je      9f
        inc     rsi
        cmp     byte ptr [rsi - 1], ' '
        jne     3b
        jmp     1b
4:      xor     eax, eax
        mov     ecx, 10
        cmp     word ptr [r8], 0x7830           # "0x"
        jne     5f
        mov     ecx, 16
        add     r8, 2
5:      movzx   edx, byte ptr [r8]
        sub     edx, '0'
        jb      9f
        cmp     edx, 9
        jbe     6f
        or      edx, 0x20
        sub     edx, 'a' - '0' - 10
        cmp     edx, ecx
        jae     9f
6:      imul    rax, rcx
        add     rax, rdx
        inc     r8
        jmp     5b
9:      ret

# put_character: DIL; put_text: the text at RDI; put_number: RDI as sixteen hexadecimal digits.
put_character:
        push    rax
        push    rdx
        mov     edx, COM1_LINE_STATUS
1:      in      al, dx
        test    al, 0x20
        jz      1b
        mov     edx, COM1
        mov     eax, edi
        out     dx, al
        pop     rdx
        pop     rax
        ret
put_text:
        push    rsi
        mov     rsi, rdi
1:      movzx   edi, byte ptr [rsi]
        inc     rsi
        test    edi, edi
        jz      2f
        call    put_character
        jmp     1b
2:      pop     rsi
        ret
put_number:
        push    rcx
        push    rsi
        mov     rsi, rdi
        mov     ecx, 16
1:      rol     rsi, 4
        mov     edi, esi
        and     edi, 15
        add     edi, '0'
        cmp     edi, '9'
        jbe     2f
        add     edi, 'a' - '0' - 10
2:      call    put_character
        dec     ecx
        jnz     1b
        pop     rsi
        pop     rcx
        ret

        .data
        .balign PAGE_SIZE                       # apart from the code, as in common32.inc
parameters: .quad 0
start:      .quad 0
pages:      .quad 0
ratio:      .quad 0
beat:       .quad 0
flush:      .quad 0
fault:      .quad 0
name_start: .asciz "start="
name_pages: .asciz "pages="
name_ratio: .asciz "ratio="
name_beat:  .asciz "beat="
name_flush: .asciz "flush="
name_fault: .asciz "fault="
text_beat:  .asciz "L "
text_errors: .asciz "E "
text_register: .asciz "REG "
text_lost:  .asciz "LOST "
text_stale: .asciz "STALE "
text_torn:  .asciz "TORN "
text_expected: .asciz " expected "
text_got:   .asciz " got "
text_exception: .asciz "X "
text_error_code: .asciz " error "
text_at:    .asciz " at "
text_address: .asciz " address "
        .balign 16
gdt:
        .quad   0
        .quad   0x00af9b000000ffff              # 64-bit code
        .quad   0x00cf93000000ffff              # data
gdt_tss:
        .quad   0, 0
gdt_pointer:
        .word   . - gdt - 1
        .quad   gdt
idt_pointer:
        .word   32 * 16 - 1
        .quad   0

        .bss
        .balign PAGE_SIZE
pml4:       .skip PAGE_SIZE
pdpt:       .skip PAGE_SIZE
page_directories: .skip 4 * PAGE_SIZE
idt:        .skip PAGE_SIZE
tss:        .skip PAGE_SIZE
fs_page:    .skip PAGE_SIZE
scratch:    .skip PAGE_SIZE
            .skip PAGE_SIZE
fault_stack_top:
            .skip PAGE_SIZE
stack_top:
