/* check - what CUnit lacks: a main for one suite, checks that print the engine's message and the distance of arrays.
 *
 *   static void test_x(void) { CHECK_OK(f()); CHECK_CLOSE(got, want, n, 1e-5); }
 *   int main(void) { return check_run("suite", (struct check_case[]){{"x", test_x}, {0}}); } */
#ifndef VITRAIL_TESTS_CHECK_H
#define VITRAIL_TESTS_CHECK_H

#include <CUnit/Basic.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"

#define CHECK(condition) CU_ASSERT(condition)
#define CHECK_OK(call)                                                                                                 \
    do {                                                                                                               \
        int check_rc = (call);                                                                                         \
        if (check_rc) fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, status_message());                 \
        CU_ASSERT(check_rc == OK);                                                                                     \
    } while (0)
/* CHECK_FAILS - the call fails with this code and its message contains `part`. */
#define CHECK_FAILS(call, code, part)                                                                                  \
    do {                                                                                                               \
        int check_rc = (call);                                                                                         \
        int check_good = check_rc == (code) && strstr(status_message(), (part));                                       \
        if (!check_good)                                                                                               \
            fprintf(stderr, "%s:%d: got %s \"%s\", wanted %s with \"%s\"\n", __FILE__, __LINE__,                       \
                    status_name(check_rc), check_rc ? status_message() : "", #code, (part));                           \
        CU_ASSERT(check_good);                                                                                         \
    } while (0)
/* CHECK_CLOSE - |got - want| <= tolerance for n floats, no NaN; prints the largest distance when it fails. */
#define CHECK_CLOSE(got, want, n, tolerance)                                                                           \
    CU_ASSERT(check_close(__FILE__, __LINE__, (got), (want), (size_t)(n), (tolerance)))

static inline int check_close(const char *file, int line, const float *got, const float *want, size_t n,
                              double tolerance)
{
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)got[i] - (double)want[i]);
        if (!(d <= worst)) {
            worst = d;
            at = i;
        }
        if (d != d) break;
    }
    if (worst <= tolerance) return 1;
    fprintf(stderr, "%s:%d: max |difference| %g at %zu (%g, expected %g), tolerance %g\n", file, line, worst, at,
            (double)got[at], (double)want[at], tolerance);
    return 0;
}

struct check_case {
    const char *name;
    void (*run)(void);
};

static inline int check_run(const char *suite_name, const struct check_case *cases)
{
    if (CU_initialize_registry() != CUE_SUCCESS) return 2;
    CU_pSuite suite = CU_add_suite(suite_name, NULL, NULL);
    for (; cases->name; cases++) CU_add_test(suite, cases->name, cases->run);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}

#endif
