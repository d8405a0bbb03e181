//! Binding that outlives a reboot: a rule of udev's for each device.
//!
//! The rule is keyed on the address and on the kind of device, so that another that comes to the
//! address stays with the host. It reserves the device before any driver's module is loaded, and has
//! Busway bind it, which looks first whether the host uses it, as it always does.
//!
//! udev runs the program as root at each boot, so it has to lie where only root can put another in its
//! place, and nothing in the rule's text may be read as more than itself.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use busway_pci::Bdf;

use super::identity::HardwareIds;
use super::kernel::{Kernel, Standing};
use super::root::{self, SysRoot};

/// The longest name of a module, and so of what drivers are called after. linux/module.h,
/// `MODULE_NAME_LEN` less its zero byte.
const DRIVER_NAME: usize = 55;

/// What udev runs: this, with the words that bind a device. Its place must be known at boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Persist {
    /// The program `busway`, by its whole path.
    pub program: PathBuf,
}

/// A rule that root would regret is not written.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// udev would run {program} as root at each boot, and {component} {why}
    #[error(
        "udev would run {} as root at each boot, and {} {why}\n  \
         install it where only root can write, and bind with it from there: {}",
        root::one_line(&program.to_string_lossy()),
        root::one_line(&component.to_string_lossy()),
        installation(program)
    )]
    Place {
        /// The program.
        program: PathBuf,
        /// What of its path somebody else could change: the file or a folder above it.
        component: PathBuf,
        /// By what.
        why: String,
    },
    /// cannot see whose {component} is: {source}
    #[error(
        "cannot see whose {} is, for udev to run what is there at boot: {source}\n  \
         bind with a busway that is installed, such as /usr/local/bin/busway",
        root::one_line(&component.to_string_lossy())
    )]
    Unseen {
        /// What could not be looked at.
        component: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// `{value}` cannot stand in a rule of udev's: {allowed}
    #[error(
        "{what} `{}` cannot stand in a rule of udev's, which root obeys: {allowed}",
        root::one_line(value)
    )]
    Text {
        /// What it is.
        what: &'static str,
        /// What it says.
        value: String,
        /// What could stand there, and what to do.
        allowed: &'static str,
    },
}

/// The command that puts a program where a rule can name it.
fn installation(program: &Path) -> String {
    let from = if is_plain_path(program) {
        program.display().to_string()
    } else {
        "./busway".to_owned()
    };
    format!("sudo install -o root -g root -m 755 {from} /usr/local/bin/busway")
}

impl Persist {
    /// Whether root can have the program run at each boot: every component of its path is root's and
    /// nobody else's to write, and none is a link, which would lead away from what was looked at.
    pub(super) fn check(&self, kernel: &dyn Kernel) -> Result<(), PersistError> {
        let program = &self.program;
        if !is_plain_path(program) {
            return Err(self.unwritable());
        }
        let mut components: Vec<_> = program.ancestors().collect();
        components.reverse();
        for component in components {
            let standing = kernel
                .standing(component)
                .map_err(|source| PersistError::Unseen {
                    component: component.to_owned(),
                    source,
                })?;
            if let Some(why) = objection(standing) {
                return Err(PersistError::Place {
                    program: program.clone(),
                    component: component.to_owned(),
                    why,
                });
            }
        }
        Ok(())
    }

    fn unwritable(&self) -> PersistError {
        PersistError::Text {
            what: "the path",
            value: self.program.to_string_lossy().into_owned(),
            allowed: "whole paths of letters, digits and . _ - + / can; bind with a busway that is \
                      installed, such as /usr/local/bin/busway",
        }
    }
}

/// Why somebody else than root decides what is there.
fn objection(standing: Standing) -> Option<String> {
    let Standing {
        owner,
        mode,
        is_link,
    } = standing;
    if owner != 0 {
        return Some(format!("belongs to user {owner}"));
    }
    if is_link {
        return Some("is a symbolic link".to_owned());
    }
    // An access control list that lets anybody write shows in the group's bits. acl(5)
    (mode & 0o022 != 0).then(|| format!("can be written by others than root (mode {mode:03o})"))
}

/// A whole path without anything that udev or a shell reads as more than itself.
fn is_plain_path(path: &Path) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-+/".contains(byte);
    let goes_down = |part| matches!(part, Component::RootDir | Component::Normal(_));
    path.is_absolute()
        && path.as_os_str().as_encoded_bytes().iter().all(plain)
        && path.components().all(goes_down)
}

/// The name of a driver as all variants of vfio-pci are named.
fn is_driver_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    (1..=DRIVER_NAME).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('-')
}

/// The host's own rules for udev.
fn rules(root: &SysRoot) -> PathBuf {
    root.etc.join("udev/rules.d")
}

/// Where the rule of a device is.
pub(super) fn rule(root: &SysRoot, address: Bdf) -> PathBuf {
    rules(root).join(format!("60-busway-{address}.rules"))
}

/// The rule's text, where there is one.
pub(super) fn rule_text(root: &SysRoot, address: Bdf) -> Option<String> {
    fs::read_to_string(rule(root, address)).ok()
}

/// The devices that have a rule.
pub(super) fn addresses(root: &SysRoot) -> Vec<Bdf> {
    let names = root::names(&rules(root));
    let address = |name: &String| {
        let name = name.strip_prefix("60-busway-")?.strip_suffix(".rules")?;
        root::full_address(name)
    };
    names.iter().filter_map(address).collect()
}

/// A rule that binds a device at each boot. udev(7)
///
/// # Errors
///
/// Where the path or the driver's name is more than udev would read as itself. All else is numbers.
pub(super) fn text(
    persist: &Persist,
    address: Bdf,
    identity: HardwareIds,
    driver: &str,
    user: Option<u32>,
) -> Result<String, PersistError> {
    if !is_driver_name(driver) {
        return Err(PersistError::Text {
            what: "the driver",
            value: driver.to_owned(),
            allowed: "names of up to 55 letters, digits, _ and - can; bind without --persist",
        });
    }
    if !is_plain_path(&persist.program) {
        return Err(persist.unwritable());
    }
    let kind = kind(identity);
    let program = persist.program.display();
    let user = user.map_or_else(String::new, |user| format!(" --user {user}"));
    Ok(format!(
        "# Gives {address} to {driver} at every boot, while it is this kind of device.\n\
         # Made by `busway device bind --persist`; `busway device restore {address}` removes it.\n\
         ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"{address}\", {kind}, \
         ATTR{{driver_override}}=\"{driver}\", \
         RUN+=\"{program} device bind --from-rule --driver {driver}{user} {address}\"\n"
    ))
}

/// What a rule asks of the kind of device.
fn kind(identity: HardwareIds) -> String {
    let HardwareIds {
        vendor,
        device,
        subsystem_vendor,
        subsystem_device,
    } = identity;
    format!(
        "ATTR{{vendor}}==\"{vendor:#06x}\", ATTR{{device}}==\"{device:#06x}\", \
         ATTR{{subsystem_vendor}}==\"{subsystem_vendor:#06x}\", \
         ATTR{{subsystem_device}}==\"{subsystem_device:#06x}\""
    )
}

/// What a rule has done at boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    /// The driver that the device is given to.
    pub(super) driver: String,
    /// Who gets its nodes.
    pub(super) user: Option<u32>,
}

impl Rule {
    /// What the text of a rule says, where [`text`] could have written it.
    pub(super) fn read(text: &str) -> Option<Self> {
        let line = text.lines().find(|line| !line.starts_with('#'))?;
        let (_, command) = line.split_once(" device bind --from-rule ")?;
        let mut words = command.strip_suffix('"')?.split(' ');
        let mut rule = None;
        let mut user = None;
        while let Some(word) = words.next() {
            match word {
                "--driver" => rule = words.next().filter(|name| is_driver_name(name)),
                "--user" => user = Some(words.next()?.parse().ok()?),
                _ => {}
            }
        }
        let driver = rule?.to_owned();
        Some(Self { driver, user })
    }
}

/// Whether a rule is for this kind of device.
pub(super) fn is_for(rule: &str, identity: HardwareIds) -> bool {
    rule.contains(&kind(identity))
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: HardwareIds = HardwareIds {
        vendor: 0x8086,
        device: 0x10d3,
        subsystem_vendor: 0x8086,
        subsystem_device: 0,
    };

    fn rule_with(program: &str, driver: &str) -> Result<String, PersistError> {
        let persist = Persist {
            program: PathBuf::from(program),
        };
        let address = "0000:01:00.0".parse().unwrap();
        text(&persist, address, IDENTITY, driver, Some(1000))
    }

    #[test]
    fn nothing_that_udev_could_read_as_more_than_itself_is_in_a_rule() {
        for program in [
            "/opt/my vm/busway",
            "/opt/100%/busway",
            "/opt/$env{PATH}/busway",
            "/opt/a\", RUN+=\"/tmp/x",
            "/opt/a'b/busway",
            "/opt/a\\b/busway",
            "/opt/a\nb/busway",
            "/opt/\u{e9}/busway",
            "/opt/../tmp/busway",
            "busway",
            "./busway",
            "",
        ] {
            let error = rule_with(program, "vfio-pci").unwrap_err();
            assert!(error.to_string().contains("letters, digits"), "{program}");
            assert!(!error.to_string().contains(char::is_control), "{error}");
        }
        let long = "a".repeat(56);
        for driver in [
            "vfio-pci\"",
            "vfio pci",
            "a,b",
            "",
            "vfio-pci\n",
            "--help",
            "%k",
            &long,
        ] {
            let error = rule_with("/usr/bin/busway", driver).unwrap_err();
            assert!(error.to_string().contains("letters, digits"), "{driver}");
        }
        for program in ["/usr/bin/busway", "/opt/busway-0.1.0+git_2/bin/busway"] {
            assert!(
                rule_with(program, "mlx5_vfio_pci")
                    .unwrap()
                    .contains(program)
            );
        }
    }

    #[test]
    fn whatever_others_can_change_is_objected_to() {
        let standing = |owner, mode, is_link| Standing {
            owner,
            mode,
            is_link,
        };
        for mode in [0o755, 0o700, 0o555, 0o4755] {
            assert_eq!(objection(standing(0, mode, false)), None, "{mode:o}");
        }
        for (owner, mode, is_link, why) in [
            (1000, 0o755, false, "belongs to user 1000"),
            (
                0,
                0o775,
                false,
                "can be written by others than root (mode 775)",
            ),
            (
                0,
                0o757,
                false,
                "can be written by others than root (mode 757)",
            ),
            // Nobody can rename what is in /tmp, but what cleans it can.
            (
                0,
                0o1777,
                false,
                "can be written by others than root (mode 1777)",
            ),
            (0, 0o777, true, "is a symbolic link"),
        ] {
            assert_eq!(
                objection(standing(owner, mode, is_link)).as_deref(),
                Some(why)
            );
        }
    }

    #[test]
    fn what_a_rule_says_is_read_from_it_and_from_no_other_text() {
        let text = rule_with("/usr/bin/busway", "mlx5_vfio_pci").unwrap();
        let rule = Rule {
            driver: "mlx5_vfio_pci".to_owned(),
            user: Some(1000),
        };
        assert_eq!(Rule::read(&text), Some(rule));
        for other in [
            "",
            "# device bind --from-rule --driver vfio-pci\"",
            "RUN+=\"/usr/bin/busway device bind --from-rule 0000:01:00.0\"",
            "RUN+=\"/usr/bin/busway device bind --from-rule --driver a;b 0000:01:00.0\"",
            "RUN+=\"/usr/bin/busway device bind --from-rule --driver vfio-pci --user x 0000:01:00.0\"",
        ] {
            assert_eq!(Rule::read(other), None, "{other}");
        }
    }

    #[test]
    fn the_rule_names_address_kind_driver_and_user() {
        let text = rule_with("/usr/local/bin/busway", "vfio-pci").unwrap();
        let rule = text.lines().last().unwrap();
        assert_eq!(
            rule,
            "ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"0000:01:00.0\", \
             ATTR{vendor}==\"0x8086\", ATTR{device}==\"0x10d3\", \
             ATTR{subsystem_vendor}==\"0x8086\", ATTR{subsystem_device}==\"0x0000\", \
             ATTR{driver_override}=\"vfio-pci\", \
             RUN+=\"/usr/local/bin/busway device bind --from-rule --driver vfio-pci \
             --user 1000 0000:01:00.0\""
        );
    }
}
