//! Which reset a device gets. Nothing here touches a device: [`Resets`](crate::Resets) carries out
//! what is decided.
//!
//! A function that can be reset by itself is. One that cannot has the slot or bus that it sits on
//! reset (VFIO's hot reset), where all that this touches is in the VM's hands. Cycling the power state
//! comes last: it need not reset more than the registers that the specification names, and many
//! devices keep everything (PCIe 6.0 §5.3.1.4.1).

use std::fmt;
use std::io;

use busway_iommu::is_vfio_driver;
use busway_pci::{Bdf, capabilities, spec};

use crate::policy;

/// Power management control: the function keeps its state on the way from D3hot to D0. PCIe 6.0
/// §7.5.2.2
const PM_NO_SOFT_RESET: u32 = 1 << 3;

/// How the kernel resets a function by itself: what `VFIO_DEVICE_RESET` does, the first of the ways
/// that the kernel has for it. Linux, Documentation/ABI/testing/sysfs-bus-pci, `reset_method`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FunctionReset {
    /// Function level reset of the PCI Express capability. PCIe 6.0 §6.6.2
    Flr,
    /// Function level reset of the advanced features capability. PCIe 6.0 §7.9.21
    AdvancedFeatures,
    /// A way that the kernel knows for devices of this kind.
    DeviceSpecific,
    /// The firmware's method `_RST`. ACPI 6.5 §7.3.25
    Acpi,
    /// Reset of the slot or bus on which the function is alone.
    Bus,
    /// To D3hot and back. PCIe 6.0 §5.3.1.4.1
    PowerState,
    /// The driver that made a mediated device.
    Mediated,
    /// A way that Busway does not know by name.
    Other,
}

impl FunctionReset {
    /// The first word of sysfs's `reset_method`, which is there from Linux 5.15 on; nothing where the
    /// file is empty, as the kernel has no way then.
    pub(crate) fn parse(methods: &str) -> Option<Self> {
        Some(match methods.split_ascii_whitespace().next()? {
            "flr" => Self::Flr,
            "af_flr" => Self::AdvancedFeatures,
            "device_specific" => Self::DeviceSpecific,
            "acpi" => Self::Acpi,
            "bus" | "cxl_bus" => Self::Bus,
            "pm" => Self::PowerState,
            _ => Self::Other,
        })
    }

    /// What a kernel that does not say takes of the ways that a device offers, by its configuration
    /// space. drivers/pci/pci.c, `pci_reset_fn_methods`
    pub(crate) fn of_capabilities(dword: &dyn Fn(u16) -> u32) -> Self {
        let capabilities = capabilities(&dword);
        let has = |id, offset: u16, bit: u32, set: bool| {
            let mut found = capabilities.iter().filter(|each| each.id == id);
            found.any(|each| (dword(each.offset.saturating_add(offset)) & bit != 0) == set)
        };
        let express = policy::EXP_DEVICE_CAPABILITIES_FLR;
        if has(
            spec::CAP_PCI_EXPRESS,
            spec::EXP_DEVICE_CAPABILITIES,
            express,
            true,
        ) {
            Self::Flr
        } else if has(
            spec::CAP_ADVANCED_FEATURES,
            0,
            policy::AF_CAPABILITIES_FLR,
            true,
        ) {
            Self::AdvancedFeatures
        } else if has(
            spec::CAP_POWER_MANAGEMENT,
            policy::PM_CONTROL,
            PM_NO_SOFT_RESET,
            false,
        ) {
            Self::PowerState
        } else {
            Self::Bus
        }
    }

    /// Whether everything in the function is as at power-on after it.
    pub(crate) fn is_thorough(self) -> bool {
        self != Self::PowerState
    }
}

/// A function that a hot reset touches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Affected {
    /// Where it is on the host.
    pub address: Bdf,
    /// The kernel holds it to be this VM's: opened by it, or of a group that it holds.
    pub owned: bool,
    /// Its driver.
    pub driver: Option<String>,
}

impl Affected {
    /// The kernel resets only what is the VM's, and with a VFIO driver, which knows what to do then.
    fn allows(&self) -> bool {
        self.owned && self.is_with_vfio()
    }

    fn is_with_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio_driver)
    }
}

/// Who it is, and what would put it into the VM's hands.
impl fmt::Display for Affected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, .. } = self;
        match self.driver.as_deref() {
            Some(driver) if self.is_with_vfio() => write!(
                f,
                "{address}, which is with {driver} but not this VM's (`--device {address}`)"
            ),
            Some("pcieport" | "shpchp") => write!(f, "the bridge {address}"),
            Some(driver) => write!(
                f,
                "{address}, which is bound to {driver} (`busway device bind {address}`, and \
                 `--device {address}`)"
            ),
            None => write!(
                f,
                "{address}, which is bound to no driver (`busway device bind {address}`, and \
                 `--device {address}`)"
            ),
        }
    }
}

/// How a device is reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResetMethod {
    /// By itself.
    Function(FunctionReset),
    /// With its slot or bus, and the other functions there.
    Hot {
        /// The others.
        others: Vec<Bdf>,
    },
    /// Not at all.
    None,
}

/// A word for it, as reports have it.
impl ResetMethod {
    /// `flr`, `af_flr`, `device_specific`, `acpi`, `bus`, `pm` and `other`, as sysfs's `reset_method`
    /// says it, and `mediated`, `hot` and `none`.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Function(FunctionReset::Flr) => "flr",
            Self::Function(FunctionReset::AdvancedFeatures) => "af_flr",
            Self::Function(FunctionReset::DeviceSpecific) => "device_specific",
            Self::Function(FunctionReset::Acpi) => "acpi",
            Self::Function(FunctionReset::Bus) => "bus",
            Self::Function(FunctionReset::PowerState) => "pm",
            Self::Function(FunctionReset::Mediated) => "mediated",
            Self::Function(FunctionReset::Other) => "other",
            Self::Hot { .. } => "hot",
            Self::None => "none",
        }
    }
}

impl fmt::Display for ResetMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Function(how) => f.write_str(match how {
                FunctionReset::Flr => "function level reset",
                FunctionReset::AdvancedFeatures => "function level reset (advanced features)",
                FunctionReset::DeviceSpecific => "the kernel's way for such devices",
                FunctionReset::Acpi => "the firmware",
                FunctionReset::Bus => "reset of the bus that it is alone on",
                FunctionReset::PowerState => "a change of its power state",
                FunctionReset::Mediated => "the driver that made it",
                FunctionReset::Other => "the kernel",
            }),
            Self::Hot { others } if others.is_empty() => f.write_str("hot reset"),
            Self::Hot { others } => {
                let others: Vec<_> = others.iter().map(Bdf::to_string).collect();
                write!(f, "hot reset, with {}", others.join(", "))
            }
            Self::None => f.write_str("nothing"),
        }
    }
}

/// Why there is no hot reset.
#[derive(Debug)]
pub(crate) enum ResetObstacle {
    /// The device is on no bus that could be reset, such as the root complex's.
    NoBus,
    /// Who is in the way.
    Blockers(Vec<Affected>),
    /// The kernel does not say what a reset would touch.
    Unknown(io::Error),
}

impl fmt::Display for ResetObstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBus => f.write_str("the host can reset neither its slot nor its bus"),
            Self::Blockers(blockers) => {
                let blockers: Vec<_> = blockers.iter().map(Affected::to_string).collect();
                write!(
                    f,
                    "a reset of its slot or bus would touch {}",
                    blockers.join("; ")
                )
            }
            Self::Unknown(error) => write!(f, "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: {error}"),
        }
    }
}

/// What was decided for a device.
#[derive(Debug)]
pub(crate) struct Decision {
    pub(crate) method: ResetMethod,
    /// What kept it from a thorough reset.
    pub(crate) obstacle: Option<ResetObstacle>,
}

/// Decides for the device at `address`, which the kernel resets by `function`. `reach` asks what a hot
/// reset would touch, and is called where that matters.
pub(crate) fn decide(
    address: Option<Bdf>,
    function: Option<FunctionReset>,
    reach: impl FnOnce() -> io::Result<Vec<Affected>>,
) -> Decision {
    let obstacle = match function {
        Some(how) if how.is_thorough() => {
            return Decision {
                method: ResetMethod::Function(how),
                obstacle: None,
            };
        }
        _ => match reach() {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => ResetObstacle::NoBus,
            Err(error) => ResetObstacle::Unknown(error),
            Ok(affected) => {
                let (free, blockers): (Vec<_>, Vec<_>) =
                    affected.into_iter().partition(Affected::allows);
                if blockers.is_empty() {
                    let others = free.into_iter().map(|each| each.address);
                    return Decision {
                        method: ResetMethod::Hot {
                            others: others.filter(|&other| Some(other) != address).collect(),
                        },
                        obstacle: None,
                    };
                }
                ResetObstacle::Blockers(blockers)
            }
        },
    };
    Decision {
        method: function.map_or(ResetMethod::None, ResetMethod::Function),
        obstacle: Some(obstacle),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Bdf {
        text.parse().unwrap()
    }

    fn affected(address: &str, owned: bool, driver: Option<&str>) -> Affected {
        Affected {
            address: at(address),
            owned,
            driver: driver.map(str::to_owned),
        }
    }

    fn decided(function: Option<FunctionReset>, reach: io::Result<Vec<Affected>>) -> Decision {
        decide(Some(at("01:00.0")), function, || reach)
    }

    #[test]
    fn a_function_that_can_be_reset_by_itself_is_and_nobody_is_asked() {
        for how in [FunctionReset::Flr, FunctionReset::Bus, FunctionReset::Other] {
            let decision = decide(None, Some(how), || unreachable!());
            assert_eq!(decision.method, ResetMethod::Function(how));
            assert!(decision.obstacle.is_none());
        }
    }

    #[test]
    fn a_hot_reset_is_better_than_a_change_of_power_state_where_all_it_touches_is_the_vms() {
        for function in [None, Some(FunctionReset::PowerState)] {
            let reach = vec![
                affected("01:00.0", true, Some("vfio-pci")),
                affected("01:00.1", true, Some("mlx5_vfio_pci")),
            ];
            let decision = decided(function, Ok(reach));
            let others = vec![at("01:00.1")];
            assert_eq!(decision.method, ResetMethod::Hot { others });
            assert!(decision.obstacle.is_none());
        }
    }

    #[test]
    fn whoever_is_in_the_way_is_named_with_driver_and_way_out() {
        let reach = || {
            Ok(vec![
                affected("01:00.0", true, Some("vfio-pci")),
                affected("01:00.1", false, Some("igb")),
                affected("01:00.2", false, Some("vfio-pci")),
                affected("01:00.3", true, None),
                affected("02:00.0", false, Some("pcieport")),
            ])
        };
        let decision = decided(Some(FunctionReset::PowerState), reach());
        let next_best = ResetMethod::Function(FunctionReset::PowerState);
        assert_eq!(decision.method, next_best);
        assert_eq!(
            decision.obstacle.unwrap().to_string(),
            "a reset of its slot or bus would touch 0000:01:00.1, which is bound to igb (`busway \
             device bind 0000:01:00.1`, and `--device 0000:01:00.1`); 0000:01:00.2, which is with \
             vfio-pci but not this VM's (`--device 0000:01:00.2`); 0000:01:00.3, which is bound to \
             no driver (`busway device bind 0000:01:00.3`, and `--device 0000:01:00.3`); the \
             bridge 0000:02:00.0"
        );
        assert_eq!(decided(None, reach()).method, ResetMethod::None);
    }

    #[test]
    fn without_a_bus_to_reset_the_next_best_is_left() {
        let none = || Err(io::Error::from_raw_os_error(libc::ENODEV));
        let decision = decided(None, none());
        assert_eq!(decision.method, ResetMethod::None);
        assert!(matches!(decision.obstacle, Some(ResetObstacle::NoBus)));
        let power = Some(FunctionReset::PowerState);
        assert_eq!(decided(power, none()).method.word(), "pm");
        let odd = Err(io::Error::from_raw_os_error(libc::EPERM));
        assert!(matches!(
            decided(None, odd).obstacle,
            Some(ResetObstacle::Unknown(_))
        ));
    }

    #[test]
    fn a_kernel_that_does_not_say_takes_what_the_capabilities_offer() {
        let space = |put: &[(u16, u32)]| {
            let mut config = vec![0_u32; 64];
            for &(offset, value) in put {
                config[usize::from(offset) / 4] = value;
            }
            move |offset: u16| {
                config
                    .get(usize::from(offset) / 4)
                    .copied()
                    .unwrap_or(u32::MAX)
            }
        };
        let list = [
            (0x04, 0x0010_0000),
            (0x34, 0x40),
            (0x40, 0x0000_8001),
            (0x80, 0x0002_0010),
        ];
        let with =
            |more: &[(u16, u32)]| FunctionReset::of_capabilities(&space(&[&list, more].concat()));
        assert_eq!(with(&[(0x84, 1 << 28)]), FunctionReset::Flr);
        assert_eq!(with(&[]), FunctionReset::PowerState);
        assert_eq!(with(&[(0x44, 1 << 3)]), FunctionReset::Bus);
        let features = [(0x80, 0x0003_0013), (0x80, 0x0306_0013)];
        assert_eq!(with(&features), FunctionReset::AdvancedFeatures);
        assert_eq!(
            FunctionReset::of_capabilities(&space(&[])),
            FunctionReset::Bus
        );
    }

    #[test]
    fn the_kernels_first_word_counts() {
        for (text, expected) in [
            ("flr pm bus\n", Some(FunctionReset::Flr)),
            ("af_flr bus\n", Some(FunctionReset::AdvancedFeatures)),
            ("pm bus\n", Some(FunctionReset::PowerState)),
            ("bus\n", Some(FunctionReset::Bus)),
            ("device_specific\n", Some(FunctionReset::DeviceSpecific)),
            ("by_magic\n", Some(FunctionReset::Other)),
            ("\n", None),
        ] {
            assert_eq!(FunctionReset::parse(text), expected, "{text}");
        }
    }
}
