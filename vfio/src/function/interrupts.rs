//! What a function interrupts by: which of a device's ways are shown to the guest, and how they begin.

use std::sync::Arc;

use busway_pci::{InterruptLines, InterruptRoutes, Msi, MsiFeatures, Msix, spec};

use crate::config::GuestConfig;
use crate::msix_layout::MsixLayout;
use crate::pin::Pin;
use crate::vectors::{MsiVectors, MsixVectors};
use crate::{DeviceIo, SurveyError};

/// MSI of a function.
#[derive(Debug)]
pub(super) struct MsiPart {
    /// Where its capability is.
    pub(super) at: u16,
    pub(super) msi: Msi,
    pub(super) vectors: MsiVectors,
}

impl MsiPart {
    /// MSI as `features` say, at the capability at `at`, which the device does not answer for from now on.
    pub(super) fn new(
        name: &str,
        io: &Arc<dyn DeviceIo>,
        (at, features): (u16, MsiFeatures),
        routes: Arc<dyn InterruptRoutes>,
        config: &mut GuestConfig,
    ) -> Self {
        let part = Self {
            at,
            msi: Msi::new(features, routes).named(name),
            vectors: MsiVectors::new(name, io.clone()),
        };
        let end = at.saturating_add(part.msi.capability_size());
        config.hide(at.saturating_add(2), end);
        part
    }
}

/// MSI-X of a function.
#[derive(Debug)]
pub(super) struct MsixPart {
    /// Where its capability is.
    pub(super) at: u16,
    pub(super) msix: Msix,
    pub(super) vectors: MsixVectors,
}

impl MsixPart {
    /// MSI-X whose table lies as `layout` says, at the capability at `at`, which the device does not answer for from
    /// now on.
    pub(super) fn new(
        name: &str,
        io: &Arc<dyn DeviceIo>,
        (at, layout): (u16, MsixLayout),
        routes: Arc<dyn InterruptRoutes>,
        config: &mut GuestConfig,
    ) -> Self {
        let msix = layout.state(name, routes);
        let register = |offset| at.saturating_add(offset);
        config.hide(register(2), register(spec::MSIX_CAPABILITY_SIZE));
        let writable = u16::from_le_bytes(Msix::CAPABILITY_WRITABLE);
        config.define(register(spec::MSIX_CONTROL), msix.control(), writable);
        config.define(register(spec::MSIX_TABLE), layout.table().register(), 0);
        config.define(register(spec::MSIX_PBA), layout.pba().register(), 0);
        Self {
            at,
            msix,
            vectors: MsixVectors::new(name, io.clone()),
        }
    }
}

/// The device's pin, connected, where it has one. Without it a device that `has_messages` can still work.
///
/// # Errors
/// [`SurveyError::Pin`]: the pin cannot be connected, and there is no other way.
pub(super) fn connect_pin(
    name: &str,
    io: &Arc<dyn DeviceIo>,
    lines: Arc<dyn InterruptLines>,
    config: &mut GuestConfig,
    has_messages: bool,
) -> Result<Option<Pin>, SurveyError> {
    let mut pin = Pin::find(name, io, lines);
    config.set_pin(&**io, pin.as_ref().map(Pin::pin));
    if let Some(Err(source)) = pin.as_mut().map(|pin| pin.connect(config)) {
        if !has_messages {
            let name = name.to_owned();
            return Err(SurveyError::Pin { name, source });
        }
        log::warn!("{name}: its interrupt pin cannot be connected: {source}");
    }
    Ok(pin)
}
