//! What helps where a device that is added to a machine that runs cannot be opened: what `busway device check`
//! finds. It is asked when the kernel has refused, so that nothing is refused which could be had.

use std::collections::BTreeSet;

use busway_host::{Check, Finding, Host, Level, Opens};
use busway_iommu::SysRoot;
use busway_vfio::{DeviceError, HostName};

use crate::config::DeviceConfig;
use crate::machine::RunError;

/// The same error, with the obstacles that the host's files show and what to do about each, as far as it does
/// not say so itself. A guest of `memory` bytes is to have the devices. `opens` says whether a node can be opened.
pub(super) fn with_remedies(
    error: RunError,
    root: &SysRoot,
    configs: &[DeviceConfig],
    memory: u64,
    opens: Opens<'_>,
) -> RunError {
    let is_the_hosts = match &error {
        RunError::Device(DeviceError::Twice { .. }) => false,
        RunError::Device(_) | RunError::DmaSpace(_) | RunError::Memlock(_) => true,
        _ => false,
    };
    let names = configs.iter().map(DeviceConfig::host_name);
    let names = names.collect::<Result<Vec<_>, _>>();
    let (true, Ok(names), Ok(host)) = (is_the_hosts, names, Host::read(root)) else {
        return error;
    };
    let (mut addresses, mut mediated) = (BTreeSet::new(), BTreeSet::new());
    for name in names {
        match name {
            HostName::Pci(address) => drop(addresses.insert(address)),
            HostName::Mediated(uuid) => drop(mediated.insert(uuid)),
        }
    }
    let check = Check::of_all(&host, &addresses, &mediated, memory, opens);
    let said = error.to_string();
    let of_host = check
        .host
        .iter()
        .map(|finding| ("the host".to_owned(), finding));
    let devices = check.devices.iter();
    let devices = devices.map(|device| (device.address.to_string(), &device.findings));
    let mediated = check.mediated.iter();
    let mediated = mediated.map(|device| (device.uuid.to_string(), &device.findings));
    let of_devices = devices.chain(mediated).flat_map(|(name, findings)| {
        let findings = findings.iter();
        findings.map(move |finding| (name.clone(), finding))
    });
    let obstacles = of_devices
        .chain(of_host)
        .filter(|(_, finding)| finding.level == Level::Obstacle)
        .filter_map(|(name, finding)| tell(&name, finding, &said));
    let obstacles: Vec<_> = obstacles.collect();
    match obstacles.is_empty() {
        true => error,
        false => RunError::NotReady {
            error: Box::new(error),
            obstacles: obstacles.join("; "),
        },
    }
}

/// A finding in a line; nothing where each of its commands is in what is `said` already.
fn tell(name: &str, finding: &Finding, said: &str) -> Option<String> {
    let command = |remedy: &busway_host::Remedy| remedy.command.as_ref().map(ToString::to_string);
    let mut commands = finding.remedies.iter().filter_map(command).peekable();
    if commands.peek().is_some() && commands.all(|command| said.contains(&command)) {
        return None;
    }
    let mut line = format!("{name}: {}", finding.text);
    for (index, remedy) in finding.remedies.iter().enumerate() {
        let between = if index == 0 { " (" } else { ", or " };
        line += between;
        line += &match command(remedy) {
            Some(command) => format!("{}: `{command}`", remedy.what),
            None => remedy.what.clone(),
        };
    }
    if !finding.remedies.is_empty() {
        line.push(')');
    }
    Some(line)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    /// A host without an IOMMU, whose one device is with a driver of its own.
    fn host() -> (tempfile::TempDir, SysRoot) {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("sys/devices/pci0000:00/0000:01:00.0");
        let links = folder.path().join("sys/bus/pci/devices");
        std::fs::create_dir_all(&device).unwrap();
        std::fs::create_dir_all(&links).unwrap();
        symlink(
            "../../../devices/pci0000:00/0000:01:00.0",
            links.join("0000:01:00.0"),
        )
        .unwrap();
        for (file, text) in [
            ("vendor", "0x8086\n"),
            ("device", "0x10d3\n"),
            ("class", "0x020000\n"),
            ("subsystem_vendor", "0x8086\n"),
            ("subsystem_device", "0x0000\n"),
            ("revision", "0x00\n"),
        ] {
            std::fs::write(device.join(file), text).unwrap();
        }
        let root = SysRoot::under(folder.path());
        (folder, root)
    }

    fn refused(_node: &Path) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EACCES))
    }

    #[test]
    fn what_the_kernel_refuses_is_told_with_what_the_check_finds() {
        let (_folder, root) = host();
        let configs = [DeviceConfig::new("0000:01:00.0").unwrap()];
        let name = configs[0].host_name().unwrap();
        let error = RunError::Device(DeviceError::NoDriver { name });
        let said = error.to_string();
        let reported = with_remedies(error, &root, &configs, 1 << 30, &refused);
        assert_eq!(reported.exit_status(), crate::exit::HOST);
        let text = reported.to_string();
        assert!(text.starts_with(&said), "{text}");
        assert!(
            text.contains("0000:01:00.0: it is in no IOMMU group"),
            "{text}"
        );
        // What the error says itself is not said again.
        assert_eq!(text.matches("busway device bind").count(), 1, "{text}");
    }

    #[test]
    fn what_no_host_can_mend_is_told_as_it_is() {
        let (_folder, root) = host();
        let configs = [DeviceConfig::new("0000:01:00.0").unwrap()];
        let name = configs[0].host_name().unwrap();
        for error in [
            RunError::SeveralDevices,
            RunError::Device(DeviceError::Twice { name }),
        ] {
            let said = error.to_string();
            let reported = with_remedies(error, &root, &configs, 1 << 30, &refused);
            assert_eq!(reported.to_string(), said);
        }
    }
}
