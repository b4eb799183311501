//! The library for Hopper (kernels/hopper_gemm.cu): W8A8 and FP8 for many tokens, by CUTLASS.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;

use libloading::{Library, Symbol};

use super::{Buffer, Gpu};
use crate::error::{Error, Result};
use crate::kernels::HOPPER_LIBRARY;

/// Its name in tables.
pub fn name(fp8: bool) -> &'static str {
    if fp8 { "hopper_fp8" } else { "hopper_w8a8" }
}

/// The structure of the library's arguments.
#[repr(C)]
struct Arguments {
    input: u64,
    weight: u64,
    input_scale: u64,
    weight_scale: u64,
    bias: u64,
    output: u64,
    m: c_int,
    n: c_int,
    k: c_int,
}

type Workspace = unsafe extern "C" fn(c_int, *const Arguments) -> usize;
type Gemm = unsafe extern "C" fn(c_int, *const Arguments, *mut c_void, *mut c_void) -> c_int;
type Status = unsafe extern "C" fn(c_int) -> *const c_char;

/// The library of a GPU's build.
pub struct Hopper<'g> {
    gpu: &'g Gpu,
    library: ManuallyDrop<Library>,
}

impl<'g> Hopper<'g> {
    /// Opens it, where the GPU's build has it ([`Gpu::has_hopper`]).
    ///
    /// # Errors
    /// [`Error::Gpu`] where it does not load.
    pub fn open(gpu: &'g Gpu) -> Result<Self> {
        // SAFETY: its hash is that of its manifest; what runs as it loads is the CUDA runtime's own.
        let library = unsafe { Library::new(gpu.build.path.join(HOPPER_LIBRARY)) };
        let library = library.map_err(|e| failed(format!("load {HOPPER_LIBRARY}"), e.to_string()))?;
        // The CUDA runtime in it is not made to be unloaded.
        Ok(Self { gpu, library: ManuallyDrop::new(library) })
    }

    /// Whether it takes weights [n, k]: rows are copied sixteen bytes at a time, and so are those of the output.
    pub fn takes((n, k): (usize, usize)) -> bool {
        n.is_multiple_of(8) && k.is_multiple_of(16)
    }

    /// What a product of these shapes works in.
    pub fn workspace(&self, fp8: bool, (m, n, k): (usize, usize, usize)) -> Result<Buffer<'g>> {
        let arguments = Arguments {
            input: 0,
            weight: 0,
            input_scale: 0,
            weight_scale: 0,
            bias: 0,
            output: 0,
            m: m as c_int,
            n: n as c_int,
            k: k as c_int,
        };
        // SAFETY: the function is the source's, and only looks at the shapes.
        let bytes = unsafe { self.function::<Workspace>("gptoss_hopper_workspace")?(c_int::from(fp8), &arguments) };
        self.gpu.filled(bytes, 0)
    }

    /// `output` [m, n] in bf16 = inputs weight^T + bias: `weight` [n, k] and `input` [m, k], int8 or E4M3, each with a scale a row in f32.
    ///
    /// # Panics
    /// Where something is shorter than the shapes say, or the shapes are none that it takes.
    #[allow(clippy::too_many_arguments, reason = "a product has that many operands")]
    pub fn product(
        &self,
        fp8: bool,
        weight: (&Buffer, &Buffer),
        input: (&Buffer, &Buffer),
        bias: Option<&Buffer>,
        output: &Buffer,
        (m, n, k): (usize, usize, usize),
        workspace: &Buffer,
    ) -> Result<()> {
        assert!(Self::takes((n, k)), "rows are whole copies");
        assert!(weight.0.bytes() >= n * k && weight.1.bytes() >= 4 * n, "the weight is all there");
        assert!(input.0.bytes() >= m * k && input.1.bytes() >= 4 * m, "inputs too");
        assert!(bias.is_none_or(|b| b.bytes() >= 2 * n) && output.bytes() >= 2 * m * n, "the rest too");
        let arguments = Arguments {
            input: input.0.address(),
            weight: weight.0.address(),
            input_scale: input.1.address(),
            weight_scale: weight.1.address(),
            bias: bias.map_or(0, Buffer::address),
            output: output.address(),
            m: m as c_int,
            n: n as c_int,
            k: k as c_int,
        };
        let place = workspace.address() as *mut c_void;
        output.written();
        // SAFETY: the function is the source's, and lengths were checked above; the context is current.
        let status = unsafe {
            self.function::<Gemm>("gptoss_hopper_gemm")?(c_int::from(fp8), &arguments, place, self.gpu.stream.cast())
        };
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the function gives a string that is there for ever.
        let words = unsafe { CStr::from_ptr(self.function::<Status>("gptoss_hopper_status")?(status)) };
        Err(failed(format!("multiply [{m}, {k}] by [{n}, {k}] with CUTLASS"), words.to_string_lossy().into_owned()))
    }

    fn function<T>(&self, name: &str) -> Result<Symbol<'_, T>> {
        // SAFETY: the library was built from the source that this program carries, whose functions have these types.
        unsafe { self.library.get(name.as_bytes()) }.map_err(|e| failed(format!("find {name}"), e.to_string()))
    }
}

fn failed(action: String, reason: String) -> Error {
    Error::Gpu { action, reason }
}
