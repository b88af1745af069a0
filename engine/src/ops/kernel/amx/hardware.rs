//! The processor's tile unit.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _MM_HINT_T1, _mm_prefetch};
use std::marker::PhantomData;

use super::{Shapes, Tiles};

/// Assembler that may change tiles.
///
/// What one block leaves in a tile or in the shapes the next one finds: nothing that the compiler makes
/// of Rust touches either, so between the blocks of one thread only the system could, and it saves them
/// with the thread's other registers. The compiler keeps blocks in order, because none is `pure`, and
/// knows nothing of what tiles hold, because every block declares all of them overwritten.
macro_rules! tiles {
    ([$($memory:ident)?] $($part:tt)*) => {
        asm!(
            $($part)*,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags $(, $memory)?)
        )
    };
}

/// This thread's tiles. They are given back when it is dropped: tiles in use make every switch between
/// threads dearer.
pub(in super::super) struct Hardware {
    /// Tiles belong to a thread.
    of_thread: PhantomData<*mut ()>,
}

impl Hardware {
    /// # Safety
    /// [`is_available`] must have said so, and no other one may be in use on this thread.
    #[inline(always)]
    pub unsafe fn new() -> Self {
        Self { of_thread: PhantomData }
    }
}

impl Drop for Hardware {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the type proves the instructions.
        unsafe { tiles!([nomem] "tilerelease") }
    }
}

// SAFETY: the type proves the instructions, the pointers are the callers' promises, and all shapes are
// those of `Shapes`, which fit each other.
impl Tiles for Hardware {
    #[inline(always)]
    fn configure(&mut self, shapes: &Shapes) {
        unsafe { tiles!([readonly] "ldtilecfg [{from}]", from = in(reg) shapes) }
    }
    #[inline(always)]
    fn zero<const TILE: u8>(&mut self) {
        unsafe { tiles!([nomem] "tilezero tmm{tile}", tile = const TILE) }
    }
    #[inline(always)]
    unsafe fn load<const TILE: u8>(&mut self, from: *const u8, stride: usize) {
        unsafe {
            tiles!(
                [readonly] "tileloadd tmm{tile}, [{from} + {stride}*1]",
                tile = const TILE, from = in(reg) from, stride = in(reg) stride
            )
        }
    }
    #[inline(always)]
    unsafe fn store<const TILE: u8>(&self, to: *mut u8, stride: usize) {
        unsafe {
            tiles!(
                [] "tilestored [{to} + {stride}*1], tmm{tile}",
                tile = const TILE, to = in(reg) to, stride = in(reg) stride
            )
        }
    }
    #[inline(always)]
    fn multiply<const TO: u8, const A: u8, const B: u8>(&mut self) {
        unsafe { tiles!([nomem] "tdpbf16ps tmm{to}, tmm{a}, tmm{b}", to = const TO, a = const A, b = const B) }
    }
    #[inline(always)]
    fn prefetch(&self, at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

/// Whether the processor has the tiles and the system lets this process use them. Asks the system for
/// leave, which then holds for all threads, those that run already among them.
pub(in super::super) fn is_available() -> bool {
    has_instructions() && system_saves_tiles() && system_permits()
}

fn has_instructions() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    if __cpuid(0).eax < 7 {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    features & (BF16 | TILE) == BF16 | TILE
}

/// Whether the system has switched the tiles on, and so saves them when it switches threads.
fn system_saves_tiles() -> bool {
    const SHAPES: u64 = 1 << 17;
    const VALUES: u64 = 1 << 18;
    /// Whether `xgetbv` may be asked.
    const OSXSAVE: u32 = 1 << 27;
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let (low, high): (u32, u32);
    // SAFETY: the processor has the instruction (`OSXSAVE`), which reads register 0 of its kind.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    let enabled = u64::from(high) << 32 | u64::from(low);
    enabled & (SHAPES | VALUES) == SHAPES | VALUES
}

/// Linux wants to be asked before the first use, see its `Documentation/arch/x86/xstate.rst`; it refuses
/// when a thread's stack for signals could not take the tiles. The answer is the same when asked again.
#[cfg(target_os = "linux")]
fn system_permits() -> bool {
    const SYS_ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const TILE_VALUES: usize = 18;
    let result: isize;
    // SAFETY: the call reads and writes no memory of ours; the kernel keeps all registers but these.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_VALUES,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result == 0
}

/// Other systems are not known.
#[cfg(not(target_os = "linux"))]
fn system_permits() -> bool {
    false
}
