//! Model-specific registers: what a processor has at power-on, and how to get back there.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::kvm::KvmError;

/// IA32_MISC_ENABLE, and its only bit that a guest expects set: fast string operations.
/// Intel SDM vol. 4, table 2-2.
const IA32_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// IA32_MTRR_DEF_TYPE: MTRRs on, everything write-back unless the guest says otherwise.
/// Intel SDM vol. 3A §12.11.2.1.
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// What has to be locked with VMX in it before VMX can be on; zero at power-on.
/// Intel SDM vol. 4, table 2-2.
const IA32_FEATURE_CONTROL: u32 = 0x3a;

/// Zero at power-on, as KVM has it, but to be written once the vCPU has its frequency. vCPUs that are
/// given the same value are synchronised by KVM. Linux, arch/x86/kvm/x86.c, `kvm_synchronize_tsc`.
const IA32_TIME_STAMP_COUNTER: u32 = 0x10;

/// The TSC runs through a reset, as it does through a processor's INIT; writing what was read would
/// only set the vCPUs' counters apart.
const RUNS_ON: [u32; 3] = [
    IA32_TIME_STAMP_COUNTER,
    0x3b,  // IA32_TSC_ADJUST
    0x6e0, // IA32_TSC_DEADLINE, which goes with the local APIC's timer mode
];

/// Sets what differs from KVM's own idea of power-on.
pub(super) fn set_boot(vcpu: &VcpuFd, id: u8) -> Result<(), KvmError> {
    synchronise_tsc(vcpu, id)?;
    set(vcpu, id, IA32_MISC_ENABLE, FAST_STRINGS)?;
    set(vcpu, id, IA32_MTRR_DEF_TYPE, MTRR_ENABLED | WRITE_BACK)
}

/// Has KVM give the vCPU the VM's TSC: one that begins with its first vCPU, and runs on when that is
/// so already.
///
/// A vCPU that was reset needs it, too. On AMD a triple fault clears the VMCB, and with it the TSC's
/// offset, which KVM goes on believing in: the guest's timers would come too late by all the time that
/// the host had been up. Linux, arch/x86/kvm/svm/svm.c, `shutdown_interception`.
pub(super) fn synchronise_tsc(vcpu: &VcpuFd, id: u8) -> Result<(), KvmError> {
    set(vcpu, id, IA32_TIME_STAMP_COUNTER, 0)
}

/// Takes the vCPU out of VMX operation, and out of a guest of its own. Nothing where there is no VMX.
///
/// Linux, arch/x86/kvm/vmx/vmx.c, `vmx_set_msr`: so does a zero that the VMM, not the guest, writes here.
pub(super) fn leave_vmx(vcpu: &VcpuFd, id: u8) -> Result<(), KvmError> {
    set(vcpu, id, IA32_FEATURE_CONTROL, 0)
}

fn set(vcpu: &VcpuFd, id: u8, index: u32, data: u64) -> Result<(), KvmError> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let one = Msrs::from_entries(&[entry]).map_err(|_| too_many(id))?;
    let set = vcpu
        .set_msrs(&one)
        .map_err(KvmError::ioctl("KVM_SET_MSRS", format_args!("vCPU {id}")))?;
    if set != 1 {
        log::debug!("vCPU {id}: KVM has no MSR {index:#x}");
    }
    Ok(())
}

/// Every register that KVM saves and restores and that has a value at power-on.
pub(super) fn read_all(kvm: &Kvm, vcpu: &VcpuFd, id: u8) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(KvmError::ioctl("KVM_GET_MSR_INDEX_LIST", "/dev/kvm"))?;
    let wanted: Vec<_> = list
        .as_slice()
        .iter()
        .filter(|index| !RUNS_ON.contains(index))
        .map(|index| kvm_msr_entry {
            index: *index,
            ..Default::default()
        })
        .collect();
    let mut values = Vec::with_capacity(wanted.len());
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let mut msrs = Msrs::from_entries(batch(rest)).map_err(|_| too_many(id))?;
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(KvmError::ioctl("KVM_GET_MSRS", format_args!("vCPU {id}")))?;
        values.extend(msrs.as_slice().iter().take(read));
        // KVM stops at the first that this vCPU has not got.
        rest = after(rest, read);
    }
    Ok(values)
}

/// Writes registers, leaving out those that KVM refuses.
pub(super) fn write_all(vcpu: &VcpuFd, id: u8, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(batch(rest)).map_err(|_| too_many(id))?;
        let written = vcpu
            .set_msrs(&msrs)
            .map_err(KvmError::ioctl("KVM_SET_MSRS", format_args!("vCPU {id}")))?;
        rest = after(rest, written);
    }
    Ok(())
}

fn batch(entries: &[kvm_msr_entry]) -> &[kvm_msr_entry] {
    entries
        .get(..kvm_bindings::KVM_MAX_MSR_ENTRIES)
        .unwrap_or(entries)
}

/// What is left after `done` of a batch: where it was not all of it, without the one it stopped at.
fn after(entries: &[kvm_msr_entry], done: usize) -> &[kvm_msr_entry] {
    let skip = usize::from(done < batch(entries).len());
    entries.get(done + skip..).unwrap_or_default()
}

fn too_many(id: u8) -> KvmError {
    KvmError::ioctl("the list of MSRs", format_args!("vCPU {id}"))(kvm_ioctls::Error::new(
        libc::E2BIG,
    ))
}
