// SPDX-License-Identifier: GPL-2.0
/*
 * Has KVM intercept a guest's writes to CR8, always.
 *
 * QEMU ends where a guest of its emulated SVM writes CR8 itself while KVM waits for a window to inject an interrupt: it
 * asserts the big lock that it does not hold there (target/i386/tcg/system/misc_helper.c, helper_write_crN, case 8).
 * Firmware does that at the end of each interrupt; Linux never does. KVM leaves such writes to the processor unless they
 * mask a pending interrupt, which svm_update_cr8_intercept() is told by two of its arguments: they are made to say so.
 */
#include <linux/kprobes.h>
#include <linux/module.h>

/* The second and the third argument: the task priority, and the highest interrupt that is pending. */
static int pending_interrupt_is_masked(struct kprobe *probe, struct pt_regs *regs)
{
	regs->si = 0xff;
	regs->dx = 0;
	return 0;
}

static struct kprobe probe = {
	.symbol_name = "svm_update_cr8_intercept",
	.pre_handler = pending_interrupt_is_masked,
};

static int __init lab_cr8_init(void)
{
	return register_kprobe(&probe);
}

static void __exit lab_cr8_exit(void)
{
	unregister_kprobe(&probe);
}

module_init(lab_cr8_init);
module_exit(lab_cr8_exit);
MODULE_DESCRIPTION("Intercepts CR8 of guests for an emulator that cannot do without");
MODULE_LICENSE("GPL");
