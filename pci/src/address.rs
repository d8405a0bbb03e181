//! Where a function sits: segment, bus, device and function number.

use std::fmt;
use std::str::FromStr;

/// A PCI segment group: what Linux calls a domain. Linux numbers those behind Intel's VMD from
/// 0x10000 up, past the specification's 16 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Segment(pub u32);

/// A bus number within a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bus(pub u8);

/// A device number on a bus, 0 to 31.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device(u8);

impl Device {
    /// How many devices a bus has.
    pub const COUNT: u8 = 32;

    /// The device numbered `number`, where it is below 32.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if number < Self::COUNT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }
}

/// A function number in a device, 0 to 7.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Function(u8);

impl Function {
    /// How many functions a device has.
    pub const COUNT: u8 = 8;

    /// The function numbered `number`, where it is below 8.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if number < Self::COUNT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }
}

/// A function's full address, written as Linux writes it: `0000:01:00.0`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// Segment group.
    pub segment: Segment,
    /// Bus.
    pub bus: Bus,
    /// Device.
    pub device: Device,
    /// Function.
    pub function: Function,
}

impl Bdf {
    /// The address on segment 0, where device and function are in range.
    #[must_use]
    pub const fn new(bus: u8, device: u8, function: u8) -> Option<Self> {
        match (Device::new(device), Function::new(function)) {
            (Some(device), Some(function)) => Some(Self {
                segment: Segment(0),
                bus: Bus(bus),
                device,
                function,
            }),
            _ => None,
        }
    }

    /// The 16-bit routing (requester) id. PCIe 6.0 §2.2.4.2.
    #[must_use]
    pub const fn routing_id(self) -> u16 {
        (self.bus.0 as u16) << 8 | (self.device.0 as u16) << 3 | self.function.0 as u16
    }

    /// The same address in another segment.
    #[must_use]
    pub const fn in_segment(self, segment: Segment) -> Self {
        Self { segment, ..self }
    }

    /// The function with this routing id, on segment 0.
    #[must_use]
    pub const fn from_routing_id(id: u16) -> Self {
        Self {
            segment: Segment(0),
            bus: Bus((id >> 8) as u8),
            device: Device((id >> 3) as u8 & 0x1f),
            function: Function(id as u8 & 7),
        }
    }
}

/// A device number on bus 0 of a segment, the bus of its root complex.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootSlot {
    /// Segment group.
    pub segment: Segment,
    /// Device.
    pub device: Device,
}

impl RootSlot {
    /// The address of a function of the device.
    #[must_use]
    pub const fn bdf(self, function: Function) -> Bdf {
        Bdf {
            segment: self.segment,
            bus: Bus(0),
            device: self.device,
            function,
        }
    }

    /// The number of a physical slot behind the root port that is here, unique in a machine: 32 for each segment. It
    /// has 13 bits (PCIe 6.0 §7.5.3.9), which are enough for 256 segments.
    #[must_use]
    pub const fn physical_slot(self) -> u16 {
        (self.segment.0 as u16 & 0xff) << 5 | self.device.0 as u16
    }
}

impl fmt::Display for RootSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bdf(Function(0)).fmt(f)
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            segment,
            bus,
            device,
            function,
        } = self;
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{}",
            segment.0, bus.0, device.0, function.0
        )
    }
}

/// `{0}` is not a PCI address: write it as 0000:01:00.0 (segment:bus:device.function) or 01:00.0
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a PCI address: write it as 0000:01:00.0 (segment:bus:device.function) or 01:00.0"
)]
pub struct ParseBdfError(pub String);

impl FromStr for Bdf {
    type Err = ParseBdfError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| ParseBdfError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Bdf> {
    let hex = |digits: &str, longest: usize| {
        let plain = !digits.is_empty()
            && digits.len() <= longest
            && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        plain
            .then(|| u32::from_str_radix(digits, 16).ok())
            .flatten()
    };
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (segment, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
    Some(Bdf {
        segment: Segment(hex(segment, 8)?),
        bus: Bus(u8::try_from(hex(bus, 2)?).ok()?),
        device: Device::new(u8::try_from(hex(device, 2)?).ok()?)?,
        function: Function::new(u8::try_from(hex(function, 1)?).ok()?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_spellings_name_the_same_function() {
        let long: Bdf = "0000:3b:1f.7".parse().unwrap();
        assert_eq!(long, "3b:1f.7".parse().unwrap());
        assert_eq!(long.to_string(), "0000:3b:1f.7");
        assert_eq!(long.routing_id(), 0x3bff);
    }

    #[test]
    fn slots_of_all_segments_have_numbers_of_their_own() {
        let slots = (0..256).flat_map(|segment| {
            (0..Device::COUNT)
                .filter_map(Device::new)
                .map(move |device| RootSlot {
                    segment: Segment(segment),
                    device,
                })
        });
        let numbers: Vec<_> = slots.clone().map(RootSlot::physical_slot).collect();
        assert!(numbers.iter().copied().eq(0..1 << 13));
        let last = slots.last().unwrap();
        assert_eq!(last.to_string(), "00ff:00:1f.0");
    }

    #[test]
    fn what_is_not_an_address_is_refused() {
        for text in [
            "",
            "01",
            "01:00",
            "01:20.0",
            "01:00.8",
            "1:0000:01:00.0",
            "+1:00.0",
            "01:00.",
            "é:0.0",
        ] {
            assert!(text.parse::<Bdf>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_routing_id_round_trips_through_text(id: u16) {
            let bdf = Bdf::from_routing_id(id);
            prop_assert_eq!(bdf.routing_id(), id);
            prop_assert_eq!(bdf.to_string().parse::<Bdf>().unwrap(), bdf);
        }
    }
}
