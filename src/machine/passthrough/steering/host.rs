//! The host's interrupts: which one a device's vector is, and where it is taken.
//!
//! Linux, Documentation/core-api/irq/irq-affinity.rst, and drivers/vfio/pci/vfio_pci_intrs.c,
//! `vfio_msi_set_vector_signal`, for the names that VFIO gives them.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;

/// The interrupts of the host whose file systems are mounted below a folder.
#[derive(Debug)]
pub(super) struct HostInterrupts {
    pub(super) root: PathBuf,
}

impl Default for HostInterrupts {
    fn default() -> Self {
        Self { root: "/".into() }
    }
}

impl HostInterrupts {
    /// Has the host take the interrupt of a device's `vector` on `cpus`. `false` where there is no such interrupt yet, or
    /// it is being moved elsewhere just now.
    ///
    /// # Errors
    /// It may not be moved, or cannot be.
    pub(super) fn steer(&self, device: &str, vector: u16, cpus: &[usize]) -> io::Result<bool> {
        let Some(irq) = self.find(device, vector)? else {
            return Ok(false);
        };
        let path = self.root.join(format!("proc/irq/{irq}/smp_affinity_list"));
        let list: Vec<_> = cpus.iter().map(usize::to_string).collect();
        let moved = File::options()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(list.join(",").as_bytes()));
        match moved {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::ResourceBusy | ErrorKind::NotFound) => {
                Ok(false)
            }
            Err(error) => Err(io::Error::new(
                error.kind(),
                format!("{}: {error}", path.display()),
            )),
        }
    }

    /// The number of the host's interrupt.
    fn find(&self, device: &str, vector: u16) -> io::Result<Option<u32>> {
        let names = [
            format!("vfio-msix[{vector}]({device})"),
            format!("vfio-msi[{vector}]({device})"),
        ];
        let numbers = self
            .root
            .join(format!("sys/bus/pci/devices/{device}/msi_irqs"));
        let numbers = match fs::read_dir(numbers) {
            // The device has no messages enabled.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            numbers => numbers?,
        };
        for number in numbers {
            let number = number?.file_name();
            let number = number.to_str().and_then(|number| number.parse().ok());
            let Some(number): Option<u32> = number else {
                continue;
            };
            let folder = self.root.join(format!("proc/irq/{number}"));
            // The folder of the handler, which has its name.
            if names.iter().any(|name| folder.join(name).is_dir()) {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }
}
