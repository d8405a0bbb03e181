//! The frequency of a VM's time-stamp counter, which a vCPU that comes later is to have from its first moment on.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::KVM_CAP_VM_TSC_CONTROL;

use crate::kvm::Vm;

/// `_IO(KVMIO, 0xa2)`: linux/kvm.h `KVM_SET_TSC_KHZ`
const KVM_SET_TSC_KHZ: libc::Ioctl = 0xaea2;

/// Has all vCPUs that a VM will have begin with the frequency that the host's TSC has now. Before its first vCPU.
///
/// Without this KVM begins each with the frequency that the host's TSC was thought to have when KVM was loaded. If that
/// is another than what the other vCPUs have been set to, KVM takes the new one for a counter of its own: it begins at 0,
/// the guest's clock is no longer the same on each processor, and its timers stand still. Linux, arch/x86/kvm/x86.c,
/// `kvm_synchronize_tsc`; `KVM_CAP_VM_TSC_CONTROL`, since Linux 5.16.
pub(super) fn fix(vm: &Vm) {
    if vm.kvm().check_extension_raw(KVM_CAP_VM_TSC_CONTROL.into()) <= 0 {
        return;
    }
    // 0 stands for the frequency of now.
    const NOW: libc::c_ulong = 0;
    // SAFETY: the descriptor is open for as long as `vm`, and the argument is a number.
    let done = unsafe { libc::ioctl(vm.fd().as_raw_fd(), KVM_SET_TSC_KHZ, NOW) };
    if done < 0 {
        let error = io::Error::last_os_error();
        log::debug!("KVM_SET_TSC_KHZ failed on the VM: {error}");
    }
}
