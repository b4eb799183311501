//! Where the work is done, in the words of accelerate's `device_map`.

use clap::{Args, ValueEnum};

/// `--device-map`, for tools that run on the processor so far.
#[derive(Debug, Clone, Copy, Args)]
pub struct DeviceArgs {
    /// Where the work is done: all three stream through the processor, layer by layer, and write the same bits; the choice is
    /// recorded in the manifest
    #[arg(long, value_enum, default_value = "sequential", help_heading = "Resources")]
    pub device_map: DeviceMap,
}

/// Its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceMap {
    /// GPUs that are there, for tools that use them; none does so far, so as sequential
    Auto,
    /// Stream
    Sequential,
    /// As sequential
    CpuOnly,
}

impl DeviceArgs {
    /// The setting as the manifest's volatile part has it.
    pub fn setting(self) -> (String, String) {
        let name = self.device_map.to_possible_value().map(|v| v.get_name().to_owned());
        ("device_map".to_owned(), name.unwrap_or_default())
    }
}
