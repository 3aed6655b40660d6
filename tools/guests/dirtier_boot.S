# dirtier_boot: the dirtier as a boot sector, for machines that boot from a disk in real mode.
#
# Real mode at 0x7c00, A20 on, flat protected mode, then as dirtier.S with [0x100000, 0x6400000) and 64 rounds.

        .intel_syntax noprefix
        .set    CODE, 0x08
        .set    DATA, 0x10

        .text
        .code16
        .globl  _start
_start:
        cli
        cld
        ljmp    0, offset 1f                    # some firmware enters at 0x07c0:0000
1:      xor     ax, ax
        mov     ds, ax
        in      al, 0x92                        # A20 on, and bit 0 (reset) must stay clear
        or      al, 2
        and     al, 0xfe
        out     0x92, al
        lgdt    [gdt_pointer]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        ljmp    CODE, offset protected

        .code32
protected:
        mov     ax, DATA
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     esp, 0x7000
        mov     edx, 0x3f8
        mov     al, 'A'
        out     dx, al
report:
        mov     ecx, 64
round:
        mov     edi, 0x100000
2:      inc     byte ptr [edi]
        add     edi, 4096
        cmp     edi, 0x6400000
        jb      2b
        dec     ecx
        jnz     round
        mov     al, 'B'
        out     dx, al
        jmp     report

        .balign 8
gdt:
        .quad   0
        .quad   0x00cf9b000000ffff              # 32-bit code, base 0, limit 4 GiB, accessed
        .quad   0x00cf93000000ffff              # data, likewise
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .org    510
        .word   0xaa55
