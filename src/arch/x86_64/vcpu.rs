//! One vCPU's registers: made, entered, and put back into their state at power-on.

use std::fmt;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_HALT_POLL, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_DISABLE_EXITS,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_PMU_CAP_DISABLE,
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_X86_DISABLE_EXITS_HLT, KVM_X86_DISABLE_EXITS_MWAIT, KVM_X86_DISABLE_EXITS_PAUSE,
    kvm_cpuid_entry2, kvm_debugregs, kvm_enable_cap, kvm_fpu, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use super::cpuid::{self, CpuFeatures, CpuidInput};
use super::{frequency, msr};
use crate::config::{MAX_CPUS, Topology};
use crate::kvm::{KvmError, Vm};

// Offsets and bits of the local APIC's page. Intel SDM vol. 3A §11.4 and §11.5.1.
const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;

/// IA32_APIC_BASE: the local APIC is on. Intel SDM vol. 3A §11.4.4.
const APIC_ENABLED: u64 = 1 << 11;

/// The FPU's control word and MXCSR at power-on. Intel SDM vol. 3A §10.1.1, table 10-1.
const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

/// What this host's KVM gives any vCPU.
#[derive(Clone, Debug)]
pub struct CpuModel {
    supported: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

impl CpuModel {
    /// Asks KVM, and takes away what `features` do not have, from CPUID and, where KVM can, from the VM,
    /// which must have no vCPU yet.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]
    pub fn new(vm: &Vm, features: CpuFeatures) -> Result<Self, KvmError> {
        let supported = vm
            .kvm()
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::ioctl("KVM_GET_SUPPORTED_CPUID", "/dev/kvm"))?;
        let mut supported = supported.as_slice().to_vec();
        cpuid::hide(&mut supported, features);
        if !features.pmu && !disable_pmu(vm)? && cpuid::is_amd(&supported) {
            log::warn!(
                "--cpus pmu=off: this host's KVM cannot take the four counters that each processor of \
                 AMD's has from a guest, only the others; Linux 5.18 and later can"
            );
        }
        if features.dedicated {
            dedicate(vm)?;
        }
        frequency::fix(vm);
        Ok(Self {
            supported,
            tsc_deadline: vm.kvm().check_extension(Cap::TscDeadlineTimer),
        })
    }

    /// Bits of a guest-physical address.
    #[must_use]
    pub fn address_bits(&self) -> u8 {
        cpuid::address_bits(&self.supported)
    }

    /// Whether the guest can have pages of 1 GiB.
    #[must_use]
    pub fn has_large_pages(&self) -> bool {
        cpuid::has_large_pages(&self.supported)
    }
}

/// Has no vCPU have performance counters; `false` where this host's KVM cannot, which then goes by
/// CPUID alone. To be called before the first vCPU is made. KVM API, KVM_CAP_PMU_CAPABILITY.
///
/// # Errors
/// [`KvmError::Ioctl`]
fn disable_pmu(vm: &Vm) -> Result<bool, KvmError> {
    let can = vm.kvm().check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if u32::try_from(can).unwrap_or(0) & KVM_PMU_CAP_DISABLE == 0 {
        return Ok(false);
    }
    let disable = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.fd()
        .enable_cap(&disable)
        .map_err(KvmError::ioctl("KVM_ENABLE_CAP", "the VM"))?;
    Ok(true)
}

/// Has no vCPU be left when it halts, pauses or waits, nor its thread poll when it is. What this host's KVM cannot do is
/// named in the log. To be called before the first vCPU is made. KVM API, KVM_CAP_X86_DISABLE_EXITS and
/// KVM_CAP_HALT_POLL.
///
/// # Errors
/// [`KvmError::Ioctl`]
fn dedicate(vm: &Vm) -> Result<(), KvmError> {
    let can = vm
        .kvm()
        .check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into());
    let can = u32::try_from(can).unwrap_or(0);
    let wanted = [
        (KVM_X86_DISABLE_EXITS_HLT, "HLT"),
        (KVM_X86_DISABLE_EXITS_PAUSE, "PAUSE"),
        (KVM_X86_DISABLE_EXITS_MWAIT, "MWAIT"),
    ];
    let has = |(bit, _): &&(u32, &str)| can & bit != 0;
    let exits = wanted.iter().filter(has).map(|(bit, _)| *bit).sum::<u32>();
    let missing: Vec<_> = wanted
        .iter()
        .filter(|one| !has(one))
        .map(|(_, name)| *name)
        .collect();
    if !missing.is_empty() {
        log::warn!(
            "--cpus dedicated=on: this host's KVM leaves the guest at {} all the same (KVM_CAP_X86_DISABLE_EXITS)",
            missing.join(", ")
        );
    }
    let set = |cap: u32, value: u32| {
        let set = kvm_enable_cap {
            cap,
            args: [value.into(), 0, 0, 0],
            ..Default::default()
        };
        vm.fd()
            .enable_cap(&set)
            .map_err(KvmError::ioctl("KVM_ENABLE_CAP", "the VM"))
    };
    if exits != 0 {
        set(KVM_CAP_X86_DISABLE_EXITS, exits)?;
    }
    if vm.kvm().check_extension_raw(KVM_CAP_HALT_POLL.into()) > 0 {
        return set(KVM_CAP_HALT_POLL, 0);
    }
    log::warn!(
        "--cpus dedicated=on: this host's KVM polls for halted vCPUs all the same (KVM_CAP_HALT_POLL)"
    );
    Ok(())
}

/// A vCPU that is not running.
pub(crate) struct Vcpu {
    pub(crate) id: u8,
    pub(crate) fd: VcpuFd,
    power_on: PowerOn,
}

/// The state that a reset goes back to.
struct PowerOn {
    regs: kvm_regs,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    debug: kvm_debugregs,
    /// None where the host has no XSAVE.
    xcrs: Option<kvm_xcrs>,
    /// The same for every vCPU.
    msrs: Arc<[kvm_msr_entry]>,
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Makes a VM's vCPUs, in their state at power-on: the first runnable, the others waiting for INIT and SIPI.
#[derive(Debug)]
pub(crate) struct VcpuMaker {
    vm: Arc<VmFd>,
    model: CpuModel,
    topology: Topology,
    /// What each has in its registers at power-on, which the first was asked for.
    msrs: Option<Arc<[kvm_msr_entry]>>,
    /// The frequency of the first one's TSC, in kHz, which all have; 0 before there is one.
    tsc_khz: u32,
}

impl VcpuMaker {
    /// Of a VM that can have all of `topology`, with the first `count` made.
    pub(crate) fn begin(
        vm: &Vm,
        model: &CpuModel,
        topology: Topology,
        count: u8,
    ) -> Result<(Self, Vec<Vcpu>), KvmError> {
        let all = topology.processors().unwrap_or(u32::MAX);
        let all = usize::try_from(all).unwrap_or(usize::MAX);
        let limit = vm.kvm().get_max_vcpus().min(MAX_CPUS.into());
        if all > limit {
            return Err(KvmError::TooManyVcpus { asked: all, limit });
        }
        let last = u8::try_from(all.saturating_sub(1)).unwrap_or(u8::MAX);
        let (id, limit) = (topology.apic_id(last), vm.kvm().get_max_vcpu_id());
        if usize::try_from(id).unwrap_or(usize::MAX) >= limit {
            return Err(KvmError::ApicId { id, limit });
        }
        let mut maker = Self {
            vm: vm.fd().clone(),
            model: model.clone(),
            topology,
            msrs: None,
            tsc_khz: 0,
        };
        // All of them before any is set up: the TSCs are synchronised by what is written to them, which
        // has to be at one frequency.
        let fds = (0..count)
            .map(|id| maker.create(id))
            .collect::<Result<Vec<_>, _>>()?;
        let first = fds.first().and_then(|first| first.get_tsc_khz().ok());
        maker.tsc_khz = first.unwrap_or(0);
        let vcpus = (0..count).zip(fds).map(|(id, fd)| {
            maker.describe(id, &fd)?;
            let msrs = match &maker.msrs {
                Some(msrs) => msrs.clone(),
                None => {
                    let all = msr::read_all(vm.kvm(), &fd, id)?;
                    maker.msrs.insert(all.into()).clone()
                }
            };
            finish(id, fd, msrs)
        });
        let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;
        Ok((maker, vcpus))
    }

    /// One more, of a number that there is none of.
    pub(crate) fn make(&self, id: u8) -> Result<Vcpu, KvmError> {
        let fd = self.create(id)?;
        self.describe(id, &fd)?;
        finish(id, fd, self.msrs.clone().unwrap_or_default())
    }

    /// The APIC id of a vCPU, which is its number for KVM too. KVM API, KVM_CREATE_VCPU
    pub(crate) fn apic_id(&self, id: u8) -> u32 {
        self.topology.apic_id(id)
    }

    fn create(&self, id: u8) -> Result<VcpuFd, KvmError> {
        let object = format_args!("vCPU {id}");
        let fd = self
            .vm
            .create_vcpu(self.apic_id(id).into())
            .map_err(KvmError::ioctl("KVM_CREATE_VCPU", object))?;
        // KVM gives a vCPU the frequency that the host's TSC was thought to have when KVM was loaded.
        // Where the host has since measured it anew, and the processor cannot scale, that fails without
        // a word: KVM then takes the guest's TSC to stand still, and its timers come too late by all the
        // time that the host has been up. 0 is the frequency of now; one that comes later has that of the
        // others. Linux, arch/x86/kvm/x86.c, `kvm_set_tsc_khz`.
        if let Err(error) = fd.set_tsc_khz(self.tsc_khz) {
            log::debug!("KVM_SET_TSC_KHZ failed on {object}: {error}");
        }
        Ok(fd)
    }

    /// Says what processor it is.
    fn describe(&self, id: u8, fd: &VcpuFd) -> Result<(), KvmError> {
        let input = CpuidInput {
            topology: self.topology,
            tsc_khz: fd.get_tsc_khz().ok().filter(|khz| *khz != 0),
            tsc_deadline: self.model.tsc_deadline,
        };
        let table = cpuid::guest_table(&self.model.supported, input, self.apic_id(id));
        let ioctl = |what| KvmError::ioctl(what, format!("vCPU {id}"));
        let table = CpuId::from_entries(&table)
            .map_err(|_| ioctl("KVM_SET_CPUID2")(kvm_ioctls::Error::new(libc::E2BIG)))?;
        fd.set_cpuid2(&table).map_err(ioctl("KVM_SET_CPUID2"))?;
        msr::set_boot(fd, id)
    }
}

/// Sets what is left to be set of a vCPU that has been described, and notes its state at power-on.
fn finish(id: u8, fd: VcpuFd, msrs: Arc<[kvm_msr_entry]>) -> Result<Vcpu, KvmError> {
    let ioctl = |what| KvmError::ioctl(what, format!("vCPU {id}"));
    let mut lapic = fd.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?;
    // As firmware leaves it: the PIC on LINT0, the NMI on LINT1. MP 1.4 §3.6.2.2.
    set_lapic(&mut lapic, LAPIC_LVT_LINT0, DELIVERY_EXTINT);
    set_lapic(&mut lapic, LAPIC_LVT_LINT1, DELIVERY_NMI);
    fd.set_lapic(&lapic).map_err(ioctl("KVM_SET_LAPIC"))?;
    let power_on = PowerOn {
        regs: fd.get_regs().map_err(ioctl("KVM_GET_REGS"))?,
        sregs: fd.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?,
        debug: fd.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?,
        xcrs: fd.get_xcrs().ok().filter(|xcrs| xcrs.nr_xcrs != 0),
        lapic,
        msrs,
    };
    Ok(Vcpu { id, fd, power_on })
}

fn set_lapic(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in lapic.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
        *register = byte as _;
    }
}

impl Vcpu {
    /// Makes this the boot processor's entry: `apply` sets the system registers and gives the
    /// general ones.
    pub(crate) fn enter(
        &mut self,
        apply: impl FnOnce(&mut kvm_sregs) -> kvm_regs,
    ) -> Result<(), KvmError> {
        let mut sregs = self.fd.get_sregs().map_err(self.ioctl("KVM_GET_SREGS"))?;
        let regs = apply(&mut sregs);
        self.fd
            .set_sregs(&sregs)
            .map_err(self.ioctl("KVM_SET_SREGS"))?;
        self.fd
            .set_regs(&regs)
            .map_err(self.ioctl("KVM_SET_REGS"))?;
        self.reset_fpu()
    }

    /// Puts every register into its state at power-on.
    pub(crate) fn reset(&mut self) -> Result<(), KvmError> {
        let state = &self.power_on;
        let events = kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_NMI_PENDING
                | KVM_VCPUEVENT_VALID_SIPI_VECTOR
                | KVM_VCPUEVENT_VALID_SHADOW,
            ..Default::default()
        };
        let mp_state = kvm_mp_state {
            mp_state: match self.id {
                0 => KVM_MP_STATE_RUNNABLE,
                _ => KVM_MP_STATE_UNINITIALIZED,
            },
        };
        // Before all else: in VMX operation KVM takes no CR4 without VMXE, such as that of power-on. AMD's
        // processors leave SVM with EFER, which is a system register.
        msr::leave_vmx(&self.fd, self.id)?;
        self.fd
            .set_vcpu_events(&events)
            .map_err(self.ioctl("KVM_SET_VCPU_EVENTS"))?;
        // The registers first: they hold the local APIC's mode, which its state depends on.
        self.fd
            .set_sregs(&state.sregs)
            .map_err(self.ioctl("KVM_SET_SREGS"))?;
        self.fd
            .set_regs(&state.regs)
            .map_err(self.ioctl("KVM_SET_REGS"))?;
        self.fd
            .set_debug_regs(&state.debug)
            .map_err(self.ioctl("KVM_SET_DEBUGREGS"))?;
        if let Some(xcrs) = &state.xcrs {
            self.fd.set_xcrs(xcrs).map_err(self.ioctl("KVM_SET_XCRS"))?;
        }
        msr::write_all(&self.fd, self.id, &state.msrs)?;
        msr::synchronise_tsc(&self.fd, self.id)?;
        self.fd
            .set_lapic(&state.lapic)
            .map_err(self.ioctl("KVM_SET_LAPIC"))?;
        self.reset_fpu()?;
        self.fd
            .set_mp_state(mp_state)
            .map_err(self.ioctl("KVM_SET_MP_STATE"))
    }

    /// Puts it aside: as at power-on, with its local APIC off, so that no INIT or SIPI of what goes on in the guest reaches
    /// it. A reset takes it back.
    pub(crate) fn park(&mut self) -> Result<(), KvmError> {
        self.reset()?;
        let sregs = kvm_sregs {
            apic_base: self.power_on.sregs.apic_base & !APIC_ENABLED,
            ..self.power_on.sregs
        };
        self.fd
            .set_sregs(&sregs)
            .map_err(self.ioctl("KVM_SET_SREGS"))
    }

    fn reset_fpu(&mut self) -> Result<(), KvmError> {
        let fpu = kvm_fpu {
            fcw: FPU_CONTROL,
            mxcsr: MXCSR,
            ..Default::default()
        };
        self.fd.set_fpu(&fpu).map_err(self.ioctl("KVM_SET_FPU"))
    }

    fn ioctl(&self, what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError + use<> {
        KvmError::ioctl(what, format!("vCPU {}", self.id))
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::KVM_STATE_NESTED_FORMAT_VMX;
    use kvm_bindings::nested::KvmNestedStateBuffer;

    use super::*;

    /// CPUID.1:ECX, and CPUID.8000_0001:ECX. Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E.4.1.
    const ECX1_VMX: u32 = 1 << 5;
    const ECX8_SVM: u32 = 1 << 2;
    const EFER_SVME: u64 = 1 << 12;

    /// The vCPU is in VMX operation, as after VMXON, or has SVM on; `false` where KVM lends guests neither.
    fn run_guests_of_its_own(vcpu: &Vcpu, model: &CpuModel) -> bool {
        let has = |function, bit| {
            let mut leaves = model.supported.iter();
            leaves.any(|leaf| leaf.function == function && leaf.ecx & bit != 0)
        };
        if has(1, ECX1_VMX) {
            let mut on = KvmNestedStateBuffer::empty();
            on.format = KVM_STATE_NESTED_FORMAT_VMX as u16;
            on.hdr.vmx.vmxon_pa = 0x1000;
            on.hdr.vmx.vmcs12_pa = u64::MAX;
            vcpu.fd.set_nested_state(&on).unwrap();
            return true;
        }
        let svm = has(0x8000_0001, ECX8_SVM);
        if svm {
            let mut sregs = vcpu.fd.get_sregs().unwrap();
            sregs.efer |= EFER_SVME;
            vcpu.fd.set_sregs(&sregs).unwrap();
        }
        svm
    }

    /// Nothing, said on standard error, where there is no KVM.
    fn one() -> Option<(Vm, CpuModel, Vcpu)> {
        let vm = Vm::new()
            .inspect_err(|error| eprintln!("skipped: {error}"))
            .ok()?;
        let model = CpuModel::new(&vm, CpuFeatures::default()).unwrap();
        let (_, mut vcpus) = VcpuMaker::begin(&vm, &model, Topology::cores(1), 1).unwrap();
        let vcpu = vcpus.remove(0);
        Some((vm, model, vcpu))
    }

    /// A vCPU's TSC, as the guest would read it.
    fn counter(vcpu: &Vcpu) -> u64 {
        const IA32_TIME_STAMP_COUNTER: u32 = 0x10;
        let entry = kvm_msr_entry {
            index: IA32_TIME_STAMP_COUNTER,
            ..Default::default()
        };
        let mut one = kvm_bindings::Msrs::from_entries(&[entry]).unwrap();
        assert_eq!(vcpu.fd.get_msrs(&mut one).unwrap(), 1);
        one.as_slice()[0].data
    }

    /// One that began its counter at 0, at a moment of its own, would be behind the first.
    #[test]
    fn a_processor_that_comes_later_has_the_counter_of_those_before_it() {
        let Some(vm) = Vm::new()
            .inspect_err(|error| eprintln!("skipped: {error}"))
            .ok()
        else {
            return;
        };
        let model = CpuModel::new(&vm, CpuFeatures::default()).unwrap();
        let (maker, first) = VcpuMaker::begin(&vm, &model, Topology::cores(2), 1).unwrap();
        // Some milliseconds of any processor's.
        while counter(&first[0]) < 50_000_000 {
            std::hint::spin_loop();
        }
        let before = counter(&first[0]);
        let second = maker.make(1).unwrap();
        assert!(counter(&second) >= before);
        assert!(counter(&second) <= counter(&first[0]));
        let khz = |vcpu: &Vcpu| vcpu.fd.get_tsc_khz().unwrap();
        assert_eq!(khz(&second), khz(&first[0]));
    }

    #[test]
    fn what_the_guest_let_xsave_save_is_forgotten_by_a_reset() {
        let Some((_vm, _, mut vcpu)) = one() else {
            return;
        };
        let Some(mut xcrs) = vcpu.power_on.xcrs else {
            eprintln!("skipped: this processor has no XSAVE");
            return;
        };
        assert_eq!(xcrs.xcrs[0].value, 1, "x87");
        // SSE as well.
        xcrs.xcrs[0].value = 3;
        vcpu.fd.set_xcrs(&xcrs).unwrap();
        vcpu.reset().unwrap();
        assert_eq!(vcpu.fd.get_xcrs().unwrap().xcrs[0].value, 1);
    }

    #[test]
    fn a_processor_that_runs_guests_of_its_own_is_reset_like_any_other() {
        let Some((_vm, model, mut vcpu)) = one() else {
            return;
        };
        if !run_guests_of_its_own(&vcpu, &model) {
            eprintln!("skipped: KVM lends guests neither VMX nor SVM");
            return;
        }
        vcpu.reset().unwrap();
        assert_eq!(vcpu.fd.get_sregs().unwrap(), vcpu.power_on.sregs);
    }
}
