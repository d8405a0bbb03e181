//! What binding asks of the kernel, as a trait so that a test can stand in for it.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The changes that binding makes to a host.
pub trait Kernel {
    /// Writes `value` to a sysfs attribute, in one write.
    ///
    /// # Errors
    ///
    /// The kernel's answer.
    fn write(&mut self, attribute: &Path, value: &str) -> io::Result<()>;

    /// Loads a module, by its name or a device's `modalias`, with what it depends on.
    ///
    /// # Errors
    ///
    /// Where there is no such module, or it cannot be loaded.
    fn load_module(&mut self, name: &str) -> io::Result<()>;
}

/// The running kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinuxKernel;

impl Kernel for LinuxKernel {
    fn write(&mut self, attribute: &Path, value: &str) -> io::Result<()> {
        // Neither created nor truncated: an attribute is there or it is not.
        let mut file = OpenOptions::new().write(true).open(attribute)?;
        // The kernel takes each write as a whole value.
        match file.write(value.as_bytes())? {
            n if n == value.len() => Ok(()),
            n => Err(io::Error::new(
                io::ErrorKind::WriteZero,
                format!("only {n} bytes of {} were taken", value.len()),
            )),
        }
    }

    fn load_module(&mut self, name: &str) -> io::Result<()> {
        let run = |program: &str| -> io::Result<Output> {
            Command::new(program)
                .args(["--", name])
                .stdin(Stdio::null())
                .output()
        };
        // Not every user's PATH has the system's programs.
        let output = match run("modprobe") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => run("/sbin/modprobe"),
            other => other,
        }
        .map_err(|error| io::Error::new(error.kind(), format!("cannot run modprobe: {error}")))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(io::Error::other(if said.is_empty() {
            format!("modprobe ended with {}", output.status)
        } else {
            said
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attribute_that_is_not_there_is_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("driver_override");
        let error = LinuxKernel.write(&path, "vfio-pci").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(!path.exists());
    }
}
