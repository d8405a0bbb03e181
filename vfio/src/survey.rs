//! Looking a device over: whether it can be given to a guest at all, its BARs, its interrupts, and
//! what of it can be mapped.

use busway_pci::{BarError, BarIndex, BarKind, BarRegion, Bars, MsiFeatures, PinError, spec};

use crate::access::read_dword;
use crate::aer::is_silent;
use crate::areas::{Area, mappable};
use crate::lists::List;
use crate::msix_layout::MsixLayout;
use crate::quirks::Quirks;
use crate::rom::Rom;
use crate::vectors::disable;
use crate::{DeviceIo, IrqError, IrqIndex, Mapping, RegionIndex};

/// A device cannot be made a function of a guest.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    /// {name} does not answer: it is gone, or in a power state that it does not come back from
    #[error(
        "{name} does not answer: its configuration space reads all ones; {}",
        match .mediated {
            true => "remove it and make it anew; `dmesg` may say more".to_owned(),
            false => format!(
                "reset it (`echo 1 > /sys/bus/pci/devices/{name}/reset`), or power the host off and on"
            ),
        }
    )]
    Silent {
        /// The device.
        name: String,
        /// Whether it is a mediated one, which a driver made.
        mediated: bool,
    },
    /// {name} is a bridge, and a guest can be given endpoints only
    #[error(
        "{name} is no endpoint (header type {layout}), and a guest can be given endpoints only"
    )]
    NotEndpoint {
        /// The device.
        name: String,
        /// Its header's layout.
        layout: u8,
    },
    /// {name} cannot be shown to a guest: {source}
    #[error("{name} cannot be shown to a guest: {source}")]
    Bar {
        /// The device.
        name: String,
        /// Which BAR, and why.
        source: BarError,
    },
    /// {name} has no interrupt but its pin, and that cannot be connected: {source}
    #[error("{name} has no interrupt but its pin, and that cannot be connected: {source}")]
    Pin {
        /// The device.
        name: String,
        /// Why.
        source: PinError,
    },
    /// {name} cannot have x_nv_gpudirect_clique=: {why}
    #[error("{name} cannot have x_nv_gpudirect_clique=: {why}")]
    Clique {
        /// The device.
        name: String,
        /// Why.
        why: &'static str,
    },
}

/// A part of a BAR that the guest reaches without an exit.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) bar: u8,
    pub(crate) area: Area,
    pub(crate) mapping: Mapping,
}

pub(crate) fn check_header(name: &str, io: &dyn DeviceIo) -> Result<(), SurveyError> {
    // VFIO holds the identity of each device, which it read when this was opened.
    if is_silent(io) {
        return Err(SurveyError::Silent {
            name: name.to_owned(),
            mediated: io.is_mediated(),
        });
    }
    let [_, _, header, _] = read_dword(io, spec::CACHE_LINE_SIZE).to_le_bytes();
    let layout = header & spec::HEADER_TYPE_LAYOUT;
    if layout != 0 {
        return Err(SurveyError::NotEndpoint {
            name: name.to_owned(),
            layout,
        });
    }
    Ok(())
}

/// The device's BARs and ROM: sizes from VFIO's regions, kinds from the registers, which VFIO fills in from
/// what the host gave the device (for a VF too, whose own are empty).
pub(crate) fn read_bars(io: &dyn DeviceIo, rom: Option<&Rom>) -> Result<Bars, BarError> {
    let mut bars = Bars::new();
    let mut upper_half = false;
    for number in 0..spec::BAR_COUNT {
        if std::mem::take(&mut upper_half) {
            continue;
        }
        let size = RegionIndex::bar(number).map_or(0, |index| io.region(index).size);
        if size == 0 {
            continue;
        }
        let register = read_dword(io, spec::BAR0 + u16::from(number) * 4);
        let prefetchable = register & spec::BAR_PREFETCHABLE != 0;
        let kind = if register & spec::BAR_IO != 0 {
            BarKind::Io
        } else if register & spec::BAR_MEMORY_64 != 0 {
            upper_half = true;
            BarKind::Memory64 { prefetchable }
        } else {
            BarKind::Memory32 { prefetchable }
        };
        bars.add(BarIndex::Bar(number), kind, size)?;
    }
    if let Some(rom) = rom {
        let kind = BarKind::Memory32 {
            prefetchable: false,
        };
        bars.add(BarIndex::Rom, kind, rom.size())?;
    }
    Ok(bars)
}

/// Where the device's MSI is and what it can do, if it can be used; else it leaves the list.
pub(crate) fn find_msi(
    name: &str,
    io: &dyn DeviceIo,
    list: &mut List,
) -> Option<(u16, MsiFeatures)> {
    let found = list.find(spec::CAP_MSI.into())?;
    let at = found.extent.start;
    let mut features = MsiFeatures::from_control((read_dword(io, at) >> 16) as u16);
    let count = io.irq(IrqIndex::Msi).count;
    features.vectors = u8::try_from(count).unwrap_or(u8::MAX).min(features.vectors);
    features.vectors = msi_vectors_given(name, io, features.vectors);
    let reason = if at.saturating_add(features.capability_size()) > found.extent.end {
        "its capability is cut short"
    } else if count == 0 {
        "the host cannot use it"
    } else {
        return Some((at, features));
    };
    log::warn!("{name}: its MSI is hidden: {reason}");
    list.hide(at);
    None
}

/// How many of a device's MSI vectors the host can give, which is not known before it is tried: a
/// guest that is told of no more is not promised what would stay silent.
fn msi_vectors_given(name: &str, io: &dyn DeviceIo, asked: u8) -> u8 {
    if asked <= 1 {
        return asked;
    }
    match io.set_irqs(IrqIndex::Msi, 0, &vec![None; asked.into()]) {
        Ok(()) => {
            disable(name, io, IrqIndex::Msi);
            asked
        }
        Err(IrqError::Fewer { given }) => {
            // A power of two. PCIe 6.0 §7.7.1.2
            let given = 1 << given.clamp(1, asked.into()).ilog2();
            log::info!(
                "{name}: the host can give {given} of its {asked} MSI vectors, and the guest is \
                 told so; a host with interrupt remapping gives more"
            );
            given
        }
        // That is said when the guest enables them.
        Err(IrqError::LineShared { .. } | IrqError::Kernel(_)) => asked,
    }
}

/// The device's MSI-X and where its capability is, where it can be used; else it leaves the list.
pub(crate) fn find_msix(
    name: &str,
    io: &dyn DeviceIo,
    list: &mut List,
    bars: &[BarRegion],
    quirks: &Quirks,
) -> Option<(u16, MsixLayout)> {
    let found = list.find(spec::CAP_MSIX.into())?;
    let at = found.extent.start;
    let bar_size = |number| {
        let bar = bars.iter().find(|bar| bar.index == BarIndex::Bar(number))?;
        (bar.kind != BarKind::Io).then_some(bar.size)
    };
    let dword = |offset: u16| read_dword(io, at.saturating_add(offset));
    let reason = if found.extent.end - at < spec::MSIX_CAPABILITY_SIZE {
        "its capability is cut short".to_owned()
    } else if io.irq(IrqIndex::Msix).count == 0 {
        "the host cannot use it".to_owned()
    } else {
        let mut capability = [0, spec::MSIX_TABLE, spec::MSIX_PBA].map(dword);
        let mut layout = MsixLayout::read(capability, bar_size);
        if let Some(offset) = quirks.pba_offset()
            && layout.is_err()
        {
            let [.., pba] = &mut capability;
            *pba = (*pba & spec::MSIX_BIR) | (offset & !spec::MSIX_BIR);
            layout = MsixLayout::read(capability, bar_size);
        }
        match layout {
            Ok(layout) => return Some((at, layout)),
            Err(error) => error.to_string(),
        }
    };
    log::warn!("{name}: its MSI-X is hidden: {reason}");
    list.hide(at);
    None
}

/// Maps every part of the memory BARs that the guest may use directly. What cannot be mapped works
/// as well, with an exit for each access.
pub(crate) fn map_parts(
    name: &str,
    io: &dyn DeviceIo,
    bars: &[BarRegion],
    layout: Option<&(u16, MsixLayout)>,
) -> Vec<Part> {
    let mut parts = Vec::new();
    for region in bars.iter().filter(|region| region.kind != BarKind::Io) {
        let BarIndex::Bar(bar) = region.index else {
            continue;
        };
        let Some(index) = RegionIndex::bar(bar) else {
            continue;
        };
        let trapped = layout.map_or_else(Vec::new, |(_, layout)| layout.in_device(bar));
        for area in mappable(&io.region(index).areas, region.size, &trapped) {
            match io.map(index, area) {
                Ok(mapping) => parts.push(Part { bar, area, mapping }),
                Err(error) => log::warn!(
                    "{name}: {} bytes of {} cannot be mapped ({error}): each access to them exits \
                     to Busway",
                    area.size,
                    region.index
                ),
            }
        }
    }
    parts
}
