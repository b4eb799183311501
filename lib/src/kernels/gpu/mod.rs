//! A GPU and an installed build of the kernels on it: memory, launches, graphs, times. As little of the CUDA driver as they need.

pub mod blas;
pub mod elementwise;
pub mod hopper;
pub mod operations;
pub mod product;
pub mod reference;
pub mod selftest;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::ptr::null_mut;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{DriverError, result};

use super::HOPPER_LIBRARY;
use super::arch::{self, Target};
use super::store::{self, Installed};
use crate::error::{Error, Result};

/// A GPU with the best installed build for it. One thread has it.
pub struct Gpu {
    /// As the driver names it.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block may ask for.
    pub shared_bytes: usize,
    /// Bytes of the L2 cache.
    pub l2_bytes: usize,
    /// Bytes of its memory.
    pub memory_bytes: usize,
    /// The kernels.
    pub build: Installed,
    target: Target,
    device: sys::CUdevice,
    stream: sys::CUstream,
    modules: RefCell<HashMap<String, sys::CUmodule>>,
    functions: RefCell<HashMap<String, Function>>,
    early_launch: bool,
    /// How often everything launched was waited for.
    waits: Cell<u64>,
}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory that it was allowed.
    shared: usize,
}

/// A kernel and the blocks that it is launched with.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The source that it is in, without its ending.
    pub source: &'static str,
    /// Its name.
    pub kernel: String,
    /// Blocks.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// Whether nothing that a kernel wrote is read before `inputs_ready`: on 9.0 and later it may then begin early.
    pub early: bool,
}

/// Memory of a GPU.
pub struct Buffer<'g> {
    address: u64,
    bytes: usize,
    /// How often everything had been waited for when the last work was launched that writes to it.
    written: Cell<Option<u64>>,
    gpu: &'g Gpu,
}

/// Launches that are repeated as one. It borrows or owns what they work on.
pub struct Graph<'b> {
    executable: sys::CUgraphExec,
    _uses: Box<dyn Fn() -> Result<()> + 'b>,
}

fn failed(action: impl Into<String>) -> impl FnOnce(DriverError) -> Error {
    let action = action.into();
    move |e| {
        let text = e.error_string().map(|s| s.to_string_lossy().into_owned());
        Error::Gpu { action, reason: text.unwrap_or_else(|_| format!("{e:?}")) }
    }
}

/// True where a driver is installed and starts.
pub fn has_driver() -> bool {
    // SAFETY: only opens the library. cudarc panics where it calls into one that is not there, so this comes first.
    let present = unsafe { sys::is_culib_present() };
    present && result::init().is_ok()
}

impl Gpu {
    /// The first GPU, with the build under `root` that suits it best.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is no driver, no GPU, or no undamaged build that runs on it, with what to do.
    pub fn open(root: &Path) -> Result<Self> {
        let refused = |text: String| Error::Refused(text);
        if !has_driver() || result::device::get_count().unwrap_or(0) == 0 {
            return Err(refused("there is no CUDA driver with a GPU here: gptoss-verify env says what is".into()));
        }
        let device = result::device::get(0).map_err(failed("open device 0"))?;
        // SAFETY: the device came from the driver.
        let attribute = |a| unsafe { result::device::get_attribute(device, a) }.map_err(failed("tell its properties"));
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
        );
        let (build, target) = best(root, capability)?;
        // SAFETY: the device came from the driver; the context is released with this.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("make a context"))?;
        // SAFETY: the context was just made.
        unsafe { result::ctx::set_current(context) }.map_err(failed("use its context"))?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("make a stream"))?;
        Ok(Self {
            name: result::device::get_name(device).map_err(failed("tell its name"))?,
            capability,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            // SAFETY: the device came from the driver.
            memory_bytes: unsafe { result::device::total_mem(device) }.map_err(failed("tell its memory"))?,
            build,
            early_launch: target.number() >= 90,
            target,
            device,
            stream,
            modules: RefCell::default(),
            functions: RefCell::default(),
            waits: Cell::new(0),
        })
    }

    /// Launches begin behind the end of those in front of them, also where they could begin earlier.
    #[must_use]
    pub fn without_early_launch(mut self) -> Self {
        self.early_launch = false;
        self
    }

    /// The architecture whose code runs, such as "9.0a".
    pub fn target(&self) -> String {
        self.target.to_string()
    }

    /// Whether the build has kernels of `source`.
    pub fn has(&self, source: &str) -> bool {
        let file = self.target.file(source);
        self.build.build.files.iter().any(|f| f.name == file)
    }

    /// Whether the build has the library for Hopper, and this is one.
    pub fn has_hopper(&self) -> bool {
        self.capability == (9, 0) && has_library(&self.build)
    }

    /// Whether the build has products by `wgmma`.
    pub fn has_wgmma(&self) -> bool {
        self.target.is_hopper()
    }

    /// `values` in the GPU's memory.
    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Buffer<'_>> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = self.room(bytes.len())?;
        if !bytes.is_empty() {
            // SAFETY: the buffer is as long as the bytes, and nothing uses it yet.
            unsafe { result::memcpy_htod_sync(buffer.address, bytes) }.map_err(failed("take data"))?;
            // It may return when the bytes were read, not when they arrived; our stream does not wait for that one.
            result::ctx::synchronize().map_err(failed("finish"))?;
        }
        Ok(buffer)
    }

    /// So many bytes in its memory, each 0xa5: what a kernel forgets to write shows.
    pub fn room(&self, bytes: usize) -> Result<Buffer<'_>> {
        self.filled(bytes, 0xa5)
    }

    /// So many bytes in its memory, each `byte`.
    pub fn filled(&self, bytes: usize, byte: u8) -> Result<Buffer<'_>> {
        let action = format!("give {bytes} bytes of memory");
        // SAFETY: the memory is filled before it is read.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(failed(action))?;
        let buffer = Buffer { address, bytes, written: Cell::new(None), gpu: self };
        // SAFETY: as long as it was made; the null stream's work is waited for below.
        unsafe { result::memset_d8_sync(address, byte, bytes.max(1)) }.map_err(failed("fill memory"))?;
        result::ctx::synchronize().map_err(failed("finish"))?;
        Ok(buffer)
    }

    /// The numbers in a buffer, after everything that was launched.
    pub fn download<T: bytemuck::Pod>(&self, buffer: &Buffer) -> Result<Vec<T>> {
        self.synchronize()?;
        let mut bytes = vec![0u8; buffer.bytes];
        // SAFETY: both are that long, and the stream is idle.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, buffer.address) }.map_err(failed("give data back"))?;
        Ok(bytemuck::pod_collect_to_vec(&bytes[..bytes.len() / size_of::<T>() * size_of::<T>()]))
    }

    /// Waits for everything that was launched.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as this.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("finish what was launched"))?;
        self.waits.set(self.waits.get() + 1);
        Ok(())
    }

    /// Launches a kernel whose structures `arguments` are.
    ///
    /// # Safety
    /// Each argument is laid out as the kernel's own, and every address in it is of memory that is as long as the kernel takes it for and lives
    /// until the launch, or the graph that it goes into, is done.
    pub unsafe fn launch(&self, launch: &Launch, arguments: &mut [*mut c_void]) -> Result<()> {
        let function = self.function(launch.source, &launch.kernel, launch.shared)?;
        // Code for 9.0 and later waits for its inputs itself, so it may start early.
        // SAFETY: a union of plain numbers.
        let mut value: sys::CUlaunchAttributeValue = unsafe { std::mem::zeroed() };
        value.programmaticStreamSerializationAllowed = 1;
        let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let mut attribute = sys::CUlaunchAttribute_st { id, pad: [0; 4], value };
        let [x, y, z] = launch.grid.map(|n| n as u32);
        let config = sys::CUlaunchConfig_st {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared as u32,
            hStream: self.stream,
            attrs: &mut attribute,
            numAttrs: u32::from(self.early_launch && launch.early),
        };
        // SAFETY: the caller vouches for the arguments; the rest lives here.
        let done = unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), null_mut()) };
        done.result().map_err(failed(format!("launch {} with {launch:?}", launch.kernel)))
    }

    /// How many blocks of a launch the GPU holds at once, by registers, threads and shared memory.
    pub fn blocks_at_once(&self, launch: &Launch) -> Result<usize> {
        let function = self.function(launch.source, &launch.kernel, launch.shared)?;
        let (mut blocks, threads) = (0, launch.threads as i32);
        // SAFETY: it writes a number, and the function came from the driver.
        let told =
            unsafe { sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, function, threads, launch.shared) };
        told.result().map_err(failed(format!("tell how many blocks of {} it holds", launch.kernel)))?;
        Ok(blocks as usize * self.multiprocessors as usize)
    }

    fn function(&self, source: &str, kernel: &str, shared: usize) -> Result<sys::CUfunction> {
        let mut functions = self.functions.borrow_mut();
        if !functions.contains_key(kernel) {
            let name = CString::new(kernel).expect("names of kernels have no zeros");
            // SAFETY: the module lives as long as this.
            let found = unsafe { result::module::get_function(self.module(source)?, name) };
            let handle = found.map_err(failed(format!("find the kernel {kernel} in {source}")))?;
            // All of what L1 and shared memory have together: the copies in flight are what hides the memory's latency.
            let what = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            // SAFETY: the function came from the driver.
            unsafe { result::function::set_function_attribute(handle, what, 100) }
                .map_err(failed(format!("give {kernel} its shared memory")))?;
            functions.insert(kernel.into(), Function { handle, shared: 48 << 10 });
        }
        let function = functions.get_mut(kernel).expect("it is there or was just put there");
        if shared > function.shared {
            let what = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function came from the driver.
            let allowed = unsafe { result::function::set_function_attribute(function.handle, what, shared as i32) };
            allowed.map_err(failed(format!("give {kernel} {shared} bytes of shared memory")))?;
            function.shared = shared;
        }
        Ok(function.handle)
    }

    fn module(&self, source: &str) -> Result<sys::CUmodule> {
        if let Some(&module) = self.modules.borrow().get(source) {
            return Ok(module);
        }
        let path = self.build.path.join(self.target.file(source));
        let mut image = std::fs::read(&path).map_err(Error::io("read", &path))?;
        // PTX is text that ends with a zero.
        image.push(0);
        // SAFETY: the file's hash is that of its manifest, and the driver reads to its own end.
        let loaded = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let module = loaded.map_err(failed(format!("load {}", path.display())))?;
        self.modules.borrow_mut().insert(source.into(), module);
        Ok(module)
    }

    /// What `body` launches, as one graph. The graph keeps `body`, so what that borrows or owns is there as long as the graph.
    pub fn capture<'b>(&'b self, body: impl Fn() -> Result<()> + 'b) -> Result<Graph<'b>> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as this.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(failed("begin a graph"))?;
        let ran = body();
        // SAFETY: as above; a capture has begun.
        let graph = unsafe { result::stream::end_capture(self.stream) }.map_err(failed("end a graph"));
        ran?;
        let graph = graph?;
        // SAFETY: the graph was just made.
        let made = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        // SAFETY: what is made of it has its own copy.
        unsafe { result::graph::destroy(graph) }.map_err(failed("free a graph"))?;
        Ok(Graph { executable: made.map_err(failed("make a graph"))?, _uses: Box::new(body) })
    }

    /// Seconds that a graph takes, each of `runs` times.
    pub fn times(&self, graph: &Graph, runs: usize) -> Result<Vec<f64>> {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = || result::event::create(flags).map_err(failed("make an event"));
        let marks: Vec<sys::CUevent> = (0..=runs).map(|_| event()).collect::<Result<_>>()?;
        // SAFETY: stream, graph and events live until they were waited for.
        let timed = unsafe {
            let record = |e: &sys::CUevent| result::event::record(*e, self.stream).map_err(failed("record an event"));
            record(&marks[0])?;
            for mark in &marks[1..] {
                result::graph::launch(graph.executable, self.stream).map_err(failed("launch a graph"))?;
                record(mark)?;
            }
            self.synchronize()?;
            let between = |pair: &[sys::CUevent]| result::event::elapsed(pair[0], pair[1]);
            marks.windows(2).map(|pair| Ok(f64::from(between(pair)?) / 1e3)).collect::<std::result::Result<_, _>>()
        };
        for mark in marks {
            // SAFETY: it was waited for.
            unsafe { result::event::destroy(mark) }.map_err(failed("free an event"))?;
        }
        timed.map_err(failed("tell a time"))
    }

    /// Copies within its memory, behind what was launched.
    pub fn copy(&self, from: &Buffer, to: &Buffer) -> Result<()> {
        assert_eq!(from.bytes, to.bytes, "both are as long");
        to.written();
        // SAFETY: both are that long.
        let copied = unsafe { result::memcpy_dtod_async(to.address, from.address, to.bytes, self.stream) };
        copied.map_err(failed("copy memory"))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Errors at the end have nobody to tell them to.
        // SAFETY: buffers and graphs borrow this, so nothing of it is in use.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for (_, module) in self.modules.borrow_mut().drain() {
                let _ = result::module::unload(module);
            }
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl Buffer<'_> {
    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Notes that work is launched that writes to it.
    fn written(&self) {
        self.written.set(Some(self.gpu.waits.get()));
    }

    /// Whether all that writes to it has been waited for.
    fn is_settled(&self) -> bool {
        self.written.get().is_none_or(|waits| waits < self.gpu.waits.get())
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        // SAFETY: it was allocated, and freeing waits for what uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        // SAFETY: it was made, and runs are waited for before this.
        let _ = unsafe { result::graph::exec_destroy(self.executable) };
    }
}

/// The undamaged build under `root` with the code that suits a GPU best, and which code that is.
fn best(root: &Path, capability: (u32, u32)) -> Result<(Installed, Target)> {
    let gpu = format!("{}.{}", capability.0, capability.1);
    let wanted = arch::of_gpus(std::iter::once(&gpu[..]));
    let advice = format!("build them with: gptoss-kernel-install --yes --arch {wanted}");
    let builds = store::list(root)?;
    if builds.is_empty() {
        return Err(Error::Refused(format!("no kernels are installed in {}; {advice}", root.display())));
    }
    let mut found: Vec<(u32, Installed, Target)> = Vec::new();
    let mut damaged = Vec::new();
    for build in builds {
        let targets = arch::parse_list(&build.build.targets.join(";"), "the manifest of a build")?;
        let best = targets.into_iter().filter_map(|t| Some((t.fitness(capability)?, t))).max_by_key(|t| t.0);
        match best {
            Some(_) if !build.damage().is_empty() => damaged.push(build.build.id),
            // A build of other sources would take other arguments.
            Some((fitness, target)) if is_of_these_sources(&build) => found.push((fitness, build, target)),
            _ => {}
        }
    }
    let key = |(fitness, build, _): &(u32, Installed, Target)| (*fitness, has_library(build), build.build.id.clone());
    let best = found.into_iter().max_by_key(key);
    best.map(|(_, build, target)| (build, target)).ok_or_else(|| {
        let harm = if damaged.is_empty() { String::new() } else { format!(" ({} damaged)", damaged.join(", ")) };
        Error::Refused(format!(
            "none of the builds in {} runs on this GPU of compute capability {gpu} and is of this version's sources{harm}; {advice}",
            root.display()
        ))
    })
}

/// Whether a build has the library for Hopper.
fn has_library(build: &Installed) -> bool {
    build.build.files.iter().any(|f| f.name == HOPPER_LIBRARY)
}

/// Whether a build was made of the sources that this program carries.
fn is_of_these_sources(build: &Installed) -> bool {
    build.build.sources == super::build::sources()
}
