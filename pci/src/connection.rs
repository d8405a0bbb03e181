//! A vector's way to the guest and what it was last told, as MSI and MSI-X both have it.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::complaints::Complaints;
use crate::interrupt::{InterruptRoute, InterruptRoutes, MsiMessage, RouteError};

/// A vector could not be connected, or not be changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VectorError {
    /// it cannot be routed to the guest: {0}
    #[error("it cannot be routed to the guest: {0}")]
    Route(#[from] RouteError),
    /// it cannot be enabled in the device: {0}
    #[error("it cannot be enabled in the device: {0}")]
    Device(#[source] std::io::Error),
    /// its message cannot be changed: {0}
    #[error("its message cannot be changed: {0}")]
    Message(#[source] RouteError),
    /// its mask cannot be changed: {0}
    #[error("its mask cannot be changed: {0}")]
    Mask(#[source] RouteError),
}

#[derive(Debug)]
pub(crate) struct Connection {
    route: Arc<dyn InterruptRoute>,
    message: MsiMessage,
    masked: bool,
}

impl Connection {
    /// A route for a vector's `message`, not masked.
    pub(crate) fn new(
        routes: &dyn InterruptRoutes,
        vector: u16,
        message: MsiMessage,
    ) -> Result<Self, VectorError> {
        Ok(Self {
            route: routes.connect(vector, message)?,
            message,
            masked: false,
        })
    }

    /// Holds interrupts back or lets them through; nothing where that is so already.
    pub(crate) fn mask(&mut self, masked: bool) -> Result<(), VectorError> {
        if self.masked != masked {
            self.route.set_masked(masked).map_err(VectorError::Mask)?;
            self.masked = masked;
        }
        Ok(())
    }

    /// Sends `message` from now on; nothing where that is so already.
    pub(crate) fn retarget(&mut self, message: MsiMessage) -> Result<(), VectorError> {
        if self.message != message {
            self.route.update(message).map_err(VectorError::Message)?;
            self.message = message;
        }
        Ok(())
    }

    pub(crate) fn pending(&self) -> bool {
        self.route.pending()
    }

    pub(crate) fn trigger(&self) {
        self.route.trigger();
    }

    pub(crate) fn event(&self) -> BorrowedFd<'_> {
        self.route.event()
    }
}

/// Where failures of a function's vectors go, which the guest can repeat as often as it likes.
#[derive(Debug)]
pub(crate) struct VectorComplaints {
    function: Box<str>,
    made: Complaints,
}

impl VectorComplaints {
    pub(crate) fn of(function: impl Into<Box<str>>) -> Self {
        Self {
            function: function.into(),
            made: Complaints::first(1),
        }
    }

    /// `what` is the vector.
    pub(crate) fn make(&self, what: &str, error: &VectorError) {
        log::log!(
            self.made.next(log::Level::Warn),
            "{}: {what}: {error}; this is tried again when the guest next unmasks it",
            self.function
        );
    }
}
