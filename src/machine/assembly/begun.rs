//! What a machine is begun with, before anything is taken from the host.

use std::path::Path;

use busway_vfio::AssignOptions;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::arch::CpuFeatures;
use crate::arch::boot::{self, BootSource};
use crate::config::VmConfig;
use crate::kvm::Vm;
use crate::machine::RunError;
use crate::machine::firmware::FirmwareSource;
use crate::machine::passthrough::options;

/// What the guest begins with.
#[derive(Debug)]
pub(super) enum Source {
    Kernel(BootSource),
    Firmware(FirmwareSource),
}

impl Source {
    pub(super) fn is_bios(&self) -> bool {
        matches!(self, Self::Firmware(source) if source.firmware.is_bios())
    }
}

/// What a machine is begun with: none of it takes the kernel long.
///
/// It belongs to the main thread, for KVM calls the VM's folder of counters after the thread that makes it, where
/// `kvm_stat` and others look for the process. Linux, virt/kvm/kvm_main.c, `kvm_create_vm_debugfs`.
#[derive(Debug)]
pub(in crate::machine) struct Begun {
    pub(super) source: Source,
    pub(super) options: Vec<AssignOptions>,
    pub(super) vm: Vm,
}

impl Begun {
    pub(in crate::machine) fn new(config: &VmConfig) -> Result<Self, RunError> {
        many_files();
        // What costs nothing to find out comes first.
        let source = open_source(config)?;
        let options: Result<_, RunError> = config.device.iter().map(options).collect();
        Ok(Self {
            source,
            options: options?,
            vm: Vm::new()?,
        })
    }
}

fn open_source(config: &VmConfig) -> Result<Source, RunError> {
    if config.firmware.is_none() {
        return Ok(Source::Kernel(open_kernel(config)?));
    }
    let kernel = config.kernel.as_ref().map(|_| open_kernel(config));
    let source = FirmwareSource::open(config, kernel.transpose()?)?;
    Ok(Source::Firmware(source))
}

fn open_kernel(config: &VmConfig) -> Result<BootSource, RunError> {
    let kernel = config.kernel.as_deref().unwrap_or(Path::new(""));
    let cmdline = match &config.cmdline {
        Some(cmdline) => cmdline,
        None => boot::default_cmdline(&config.serial, &config.console),
    };
    Ok(BootSource::open(
        kernel,
        config.initramfs.as_deref(),
        cmdline,
    )?)
}

pub(super) fn cpu_features(config: &VmConfig) -> CpuFeatures {
    CpuFeatures {
        nested: config.cpus.nested,
        pmu: config.cpus.pmu,
        dedicated: config.cpus.dedicated,
    }
}

/// Keeps glibc from giving each thread a heap of its own: what the threads here allocate is little,
/// and each heap has pages that are only ever touched once. Call it before any thread is started.
pub fn few_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the parameter exists and takes any count; allocations made before stay valid.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Has as many files be open as this process may raise its limit to: each vector of a device that its
/// driver uses is one, and the usual limit is below what a guest with many devices and processors has.
fn many_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::debug!("RLIMIT_NOFILE: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_files_can_be_open_as_the_limit_can_be_raised_to() {
        let limit = getrlimit(Resource::Nofile);
        // Others' tests go on meanwhile.
        let lower = Rlimit {
            current: limit.maximum.map(|most| most - 1),
            ..limit
        };
        setrlimit(Resource::Nofile, lower).unwrap();
        many_files();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
